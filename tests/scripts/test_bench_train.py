"""The benchmark of training: its parts, on the tiny model."""

import argparse

import bench_step
import bench_train as bench
import pytest


@pytest.fixture(autouse=True)
def usual_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the tests that follow in this process."""
    monkeypatch.setattr(bench_step, "return_freed_memory", lambda threshold: None)


def measure(task: str, method: str) -> dict:
    options = {"batch": 4, "steps": 2, "warmup": 1, "threads": 1, "checkpointed": 0, "mini_batch": 0, "clock": "wall"}
    flags = {"amp": False, "compile": False, "profile": False}
    return bench.measure(argparse.Namespace(task=task, method=method, device="cpu", size="tiny", **options, **flags))


def check(one: dict) -> None:
    assert len(one["seconds"]) == 2
    assert min(one["seconds"]) > 0
    assert one["checkpoint"] >= 4 * one["trained"] > 0


def test_a_measurement():
    aurora, frozen = measure("retrieval", "aurora-64"), measure("retrieval", "frozen-flow")
    check(aurora)
    # 9L * 2r + 2dr + 2Ld; [CLS] and one bias.
    assert aurora["trained"] == 9 * 3 * 2 * 64 + 2 * 128 * 64 + 2 * 3 * 128
    assert frozen["trained"] == 2 * 128
    # Both count the weights of one plain BLIP, whatever is added.
    assert aurora["backbone"] == frozen["backbone"]


@pytest.mark.slow
def test_what_a_method_with_more_words_trains():
    less = measure("retrieval", "aurora-64+last6+merge16+cached+alone")
    check(less)
    assert less["trained"] == 9 * 2 * 64 + 2 * 128 * 64 + 2 * 128
    # 8 of BLIP base's 12 layers are 2 of 3; 28 slots a layer.
    assert (
        measure("retrieval", "aurora-all-64+last8+alone")["trained"] == 28 * 2 * 2 * 64 + 2 * 128 * 64 + 2 * 2 * 128
    )
    # All 28 slots of the last 2 layers, 16 of the text tower's in the first.
    assert (
        measure("retrieval", "aurora-all-64+vision8+merge16+alone")["trained"]
        == (28 * 2 + 16) * 2 * 64 + 2 * 128 * 64 + 2 * 3 * 128
    )
    assert measure("retrieval", "lora-attention-32+alone")["trained"] == 16 * 3 * 128 * 32


@pytest.mark.slow
@pytest.mark.parametrize("task", bench.TASKS)
@pytest.mark.parametrize("method", bench.METHODS)
def test_every_method_on_every_task(task, method):
    check(measure(task, method))


def test_tables_have_the_units_at_one():
    def entry(seconds: float, memory: float, trained: int) -> dict:
        spread = {"fastest": seconds, "slowest": seconds}
        return {"seconds": seconds, "memory": memory, "trained": trained, "checkpoint": 4 * trained, **spread}

    results = {
        "retrieval": {
            "lavis-uniadapter-512": entry(10.0, 4e9, 18_908_160),
            "uniadapter-512": entry(5.0, 2e9, 18_908_160),
            "aurora-64": entry(4.0, 1e9, 130_560),
        }
    }
    first, second = bench.tables(results).split("Unit: ")[1:]
    assert "| UniAdapter (r=512), LAVIS's own | 18.91M | 1.00 | 1.00 |" in first
    assert "| Aurora (r=64) | 0.13M | 0.40 | 0.25 |" in first
    assert "| UniAdapter (r=512) | 18.91M | 1.00 | 1.00 |" in second
    assert "| Aurora (r=64) | 0.13M | 0.80 | 0.50 |" in second


def test_every_method_has_a_name_of_its_own():
    names = {method: bench.method_name(method) for method in bench.METHODS}
    assert len(set(names.values())) == len(names)
    assert not [name for name in names.values() if set(name.split(", ")) & set(bench_step.SETTINGS)]
    assert names["frozen-flow"] == "frozen, gradients flow" and names["lavis-full"] == "full, LAVIS's own"
    assert set(bench.UNITS) <= names.keys()


def test_the_methods_of_the_frontier_are_those_that_the_comparison_names():
    found = bench.expanded(["frontier"])
    assert found[0] == bench.UNITS[0] and "aurora-all-64+last8+merge16+alone" in found
    assert "aurora-64" not in found and found == [one for one in bench.METHODS if one in found]
    assert bench.expanded(["aurora-64", "full"]) == ["full", "aurora-64"]
