"""The check of a GPU: that it finds faults, says why it cannot run, and that all of it runs, on a CPU."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import check_gpu
import gpu_models
import pytest
import torch
from gpu_report import FAILED, OK, SKIPPED, Case, Row, Setting, compare, computed, relative_error
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = Setting(torch.device("cpu"), "tiny")
WITHOUT_LAVIS = """
import importlib.util, runpy, sys
original = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "lavis" else original(name, *rest)
sys.modules["lavis"] = None
sys.path.insert(0, "scripts")
runpy.run_path("scripts/check_gpu.py", run_name="__main__")
"""


class Product(Case):
    """x w, with something wrong in half precision: ``scaled`` in the result or in the gradient, or no number."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.x, self.w = torch.linspace(-1, 1, 12).view(3, 4), nn.Parameter(torch.linspace(1, 2, 8).view(4, 2))
        self.fault = fault

    def forward(self) -> Tensor:
        product = self.x @ self.w
        if product.dtype == torch.float32 or not self.fault:
            return product
        if self.fault == "gradient":
            product.register_hook(lambda gradient: 2 * gradient)
        return {"result": 2 * product, "nan": product * float("nan")}.get(self.fault, product)


def test_a_case_against_a_plain_computation():
    case = Product()
    found = computed(case, torch.device("cpu"), torch.float16)
    weights = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found["result"], case.x @ case.w, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found["w"], case.x.t() @ weights, atol=5e-3, rtol=5e-3)
    assert relative_error(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])) == 1.25
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


@pytest.mark.parametrize("fault", ["", "result", "gradient", "nan"])
def test_a_fault_is_found_where_it_is(fault):
    statuses = {one.check: one.status for one in compare("product", Product(fault), ON_CPU)}
    half = FAILED if fault else OK
    assert statuses == {"product, fp32": OK, "product, fp16": half, "product, bf16": half}


def test_a_part_that_breaks_or_lasts_is_a_failure_and_the_others_run(capsys):
    def broken(setting: Setting) -> Iterator[Row]:
        yield Row("first", OK)
        raise ValueError("two\nlines")

    def endless(setting: Setting) -> Iterator[Row]:
        time.sleep(60)
        yield Row("never", OK)

    rows, seconds = check_gpu.run_parts({"broken": broken, "endless": endless, "after": endless}, ON_CPU, limit=0.3)
    found = [(one.part, one.check, one.status) for one in rows]
    assert found == [
        ("broken", "first", OK),
        ("broken", "runs", FAILED),
        ("endless", "all of it", FAILED),
        ("after", "all of it", FAILED),
    ]
    assert rows[1].found == "ValueError: two lines" and rows[2].found == "not done within 0 s"
    assert seconds.keys() == {"broken", "endless", "after"} and sum(seconds.values()) < 30
    assert "| broken | runs | ValueError: two lines |  | FAILED |" in capsys.readouterr().out


def test_a_way_without_room_costs_no_other_and_measures_none(monkeypatch):
    def run_all(args) -> dict:
        if args.methods == ["aurora-64"]:
            sys.exit("retrieval, aurora-64 failed:\ntorch.OutOfMemoryError: CUDA out of memory")
        return {"retrieval": {args.methods[0]: {"seconds": 2.0, "memory": 3e6}}}

    monkeypatch.setattr(gpu_models.bench_train, "run_all", run_all)
    without, measured = gpu_models.check_time(ON_CPU)
    assert without.status == SKIPPED and "more memory" in without.found
    assert measured.found.startswith("2 s (1.00 x ") and "Aurora" not in measured.found


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/check_gpu.sh")],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"check_gpu: torch {torch.__version__} sees no GPU")


def test_without_torch_it_says_so():
    command = [sys.executable, "-S", "-E", str(ROOT / "scripts/check_gpu.py")]  # -S: nothing that is installed
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert "cannot import torch and safetensors (" in done.stderr
    assert "set PYTHON to an interpreter that has them" in done.stderr


def test_an_interpreter_that_is_not_there_is_no_other():
    command = ["bash", str(ROOT / "scripts/check_gpu.sh")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "PYTHON": "/absent"})
    assert done.returncode == 2 and done.stderr.startswith("check_gpu: no /absent: nothing was checked")


def test_what_fails_and_what_the_device_cannot_do_is_in_the_file(tmp_path: Path, monkeypatch, capsys):
    """A GPU without bfloat16, a part that breaks, one that was not there to run, and one that holds."""

    def broken(setting: Setting) -> Iterator[Row]:
        raise ValueError("no")
        yield

    def held(setting: Setting) -> Iterator[Row]:
        yield Row("one", OK)

    monkeypatch.setattr(Setting, "precisions", ["fp32", "fp16"])
    parts = {"broken": broken, "held": held}, {"parts with BLIP": "no LAVIS"}
    monkeypatch.setattr(check_gpu, "all_parts", lambda: parts)
    # It would be the level of all tests after it.
    monkeypatch.setattr(check_gpu.logging.getLogger(), "setLevel", lambda level: None)
    path = tmp_path / "new" / "check.json"
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", "--device", "cpu", "--out", str(path)])
    assert check_gpu.main() == 1
    content = json.loads(path.read_text())
    statuses = {one["part"]: one["status"] for one in content["rows"]}
    assert statuses == {"broken": FAILED, "held": OK, "parts with BLIP": SKIPPED, "bf16": SKIPPED}
    assert content["failed"] == 1 and content["about"]["torch"] == torch.__version__
    assert "bf16: skipped, the device does not compute in it" in capsys.readouterr().out


@pytest.mark.slow
def test_what_needs_torch_alone_runs_without_lavis(tmp_path: Path):
    path = tmp_path / "found" / "check.json"
    command = [sys.executable, "-c", WITHOUT_LAVIS, "--device", "cpu", "--out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    statuses = {one["part"]: one["status"] for one in content["rows"]}
    assert statuses == {"linear layers": OK, "gate and context": OK, "adapters": OK, "parts with BLIP": SKIPPED}
    assert "'lavis'" in content["rows"][-1]["found"] and "skipped, LAVIS" in done.stdout
    about = content["about"]
    assert about["device"] == "cpu" and about["torch"] == torch.__version__ and about["processor"]
    assert "| linear layers | folded linear, blocks in columns, bf16 |" in done.stdout


def test_what_cannot_be_imported_although_lavis_is_there_has_failed(monkeypatch):
    monkeypatch.setitem(sys.modules, "gpu_models", None)
    parts, missing = check_gpu.all_parts()
    assert missing == {}
    [row], _ = check_gpu.run_parts({check_gpu.BLIP: parts[check_gpu.BLIP]}, ON_CPU, 60.0)
    assert row.status == FAILED and "gpu_models" in row.found


@pytest.mark.slow
def test_random_numbers_that_are_not_put_back_are_found(monkeypatch):
    assert {one.status for one in gpu_models.check_resume(ON_CPU)} == {OK}
    monkeypatch.setattr(gpu_models, "set_random_state", lambda state: None)
    rows = {one.check: one.status for one in gpu_models.check_resume(ON_CPU)}
    assert rows["losses and gradients after a resume"] == FAILED


def test_a_backbone_that_moves_is_found(monkeypatch):
    model = gpu_models.model_of("retrieval", "aurora-64", ON_CPU)
    assert gpu_models._trained("retrieval", "aurora-64", "bf16", model, ON_CPU).status == OK
    bias = model.visual_encoder.norm.bias
    original = gpu_models.train_epoch

    def moving(state):
        bias.data += 1
        return original(state)

    monkeypatch.setattr(gpu_models, "train_epoch", moving)
    found = gpu_models._trained("retrieval", "aurora-64", "bf16", model, ON_CPU)
    assert found.status == FAILED and "1 frozen" in found.found


@pytest.fixture
def _nothing_before():
    """The garbage collector, by which memory is counted, does not look through what is there already."""
    gc.freeze()  # as conftest does once; what is frozen stays so
    yield


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_before")
def test_memory_that_is_kept_is_found(monkeypatch):
    assert {one.status for one in gpu_models.check_memory(ON_CPU)} == {OK}
    kept, original = [], gpu_models.train_epoch

    def leaking(state):
        kept.append(torch.zeros(2**20))
        return original(state)

    monkeypatch.setattr(gpu_models, "train_epoch", leaking)
    rows = list(gpu_models.check_memory(ON_CPU))
    assert rows[0].status == FAILED


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu(tmp_path: Path):
    """But what only a GPU has; by the program, on tiny models."""
    path = tmp_path / "check.json"
    command = [sys.executable, str(ROOT / "scripts/check_gpu.py"), "--device", "cpu", "--out", str(path)]
    done = subprocess.run([*command, "--limit", "1500"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    assert content["failed"] == 0 and {one["part"] for one in content["rows"]} == set(check_gpu.all_parts()[0])
    checks = " ".join(one["check"] for one in content["rows"])
    assert all(f"retrieval, {tuning}, fp16" in checks for tuning in gpu_models.TUNINGS) and "vqa, aurora-64" in checks
    skipped = [one["part"] for one in content["rows"] if one["status"] == SKIPPED]
    assert skipped == ["checkpointing", "tests"]
