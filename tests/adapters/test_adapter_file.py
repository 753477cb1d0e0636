"""Law 6: an adapter survives its folder; what does not fit is refused with the difference."""

import hashlib
import json
import os
import pickle
import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from toy import TARGETS, Toy, adapted_toy, as_format_1, inputs, randomize, rewrite_adapter

import lavis_aurora.adapters.files as adapter_file
from lavis_aurora import (
    AuroraError,
    ModeApproxConfig,
    inject_mode_approx,
    list_adapters,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
)
from lavis_aurora.adapters.config import AdapterConfig
from lavis_aurora.adapters.switching import bind_companions

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A model and the folder of its adapter."""
    model = adapted_toy()
    save_adapter(model, tmp_path / "adapter", metrics={"epoch": 3, "val": {"r1": 41.5}})
    return model, tmp_path / "adapter"


# Round trips


def test_a_fresh_model_with_the_adapter_is_the_tuned_one(saved):
    model, folder = saved
    fresh = adapted_toy(update_seed=9)
    load_adapter(fresh, folder)
    assert torch.equal(fresh(inputs()), model(inputs()))
    assert all(p.requires_grad for p in fresh.mode_approx.parameters())


def test_under_a_new_name_it_stands_beside_and_is_frozen(saved):
    model, folder = saved
    other = adapted_toy(rank=2, update_seed=5)
    before = other(inputs())
    load_adapter(other, folder, "tuned")
    assert torch.equal(other(inputs()), before)
    set_adapter(other, "tuned")
    assert torch.equal(other(inputs()), model(inputs()))
    assert not any(p.requires_grad for p in other.mode_approx.sets["tuned"].parameters())
    assert list_adapters(other) == ["default", "tuned"]


def with_head(trained: bool):
    model = adapted_toy()
    model.heads = [model.head.requires_grad_(trained)]
    bind_companions(model, model.mode_approx, train_heads=trained)
    return model


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("trained", [True, False])
def test_heads_come_and_go_with_the_adapter_that_is_loaded_over_an_active_one(tmp_path, name, trained):
    tuned = with_head(True)
    with torch.no_grad():
        tuned.head.weight.fill_(7)
    save_adapter(tuned, tmp_path / "headed")
    save_adapter(with_head(False), tmp_path / "bare")
    model = with_head(trained)
    base = model.head.weight.detach().clone()
    load_adapter(model, tmp_path / "bare", name)
    set_adapter(model, name)
    for folder, expected in (("headed", tuned.head.weight), ("bare", base)):
        load_adapter(model, tmp_path / folder, name)
        assert torch.equal(model.head.weight, expected)
    assert model.head.weight.requires_grad is (trained and name == "default")


def test_the_named_adapter_is_saved(saved, tmp_path):
    model, _ = saved
    model.mode_approx.add_set("wide", ModeApproxConfig(rank=7))
    randomize(model, "wide", 3)
    save_adapter(model, tmp_path / "wide", name="wide")
    fresh = adapted_toy(rank=7)
    load_adapter(fresh, tmp_path / "wide")
    set_adapter(model, "wide")
    assert torch.equal(fresh(inputs()), model(inputs()))
    with pytest.raises(AuroraError, match="no adapter 'wied'; did you mean 'wide'"):
        save_adapter(model, tmp_path / "wide", name="wied")


def test_the_config_round_trips(saved):
    text = (saved[1] / CONFIG).read_text()
    config = AdapterConfig.from_json(text)
    assert config.to_json() == text
    assert AdapterConfig.from_json(config.to_json()) == config
    assert config.metrics == {"epoch": 3, "val": {"r1": 41.5}}
    assert config.slots["query"] == [24, 6]


def test_saving_a_merged_adapter_is_saving_it_unmerged(saved, tmp_path):
    model, folder = saved
    merge_adapter(model)
    save_adapter(model, tmp_path / "again")
    first, again = (load_file(f / TENSORS) for f in (folder, tmp_path / "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    base = [json.loads((f / CONFIG).read_text())["base"] for f in (folder, tmp_path / "again")]
    assert base[0] == base[1]


def test_blip_base_at_rank_64_is_below_07_mb(tmp_path):
    """BLIP base's own shapes without their memory; the shared factors are in the file once."""
    zero = nn.Parameter(torch.zeros(1))
    model = nn.ModuleDict()
    for i in range(12):
        for block, names in (("vision", ["qkv"]), ("self", ("query", "key", "value")), ("cross", ("query", "key"))):
            model[f"{block}{i}"] = nn.ModuleDict({n: nn.Linear(8, 8, device="meta") for n in names})
        model[f"cross{i}"]["value"] = nn.Linear(8, 8, device="meta")
    for module in model.modules():
        if isinstance(module, nn.ModuleDict) and not isinstance(next(iter(module.values())), nn.ModuleDict):
            for name, linear in module.items():
                rows = 3 * 768 if name == "qkv" else 768
                linear.weight = nn.Parameter(zero.detach().expand(rows, 768))
                linear.in_features, linear.out_features, linear.bias = 768, rows, None
    factors = inject_mode_approx(model, ModeApproxConfig(rank=64), [r".*\.(qkv|query|key|value)"])
    assert len(factors.slots) == 108
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    gates = 2 * 12 * 768
    assert sum(t.numel() for t in tensors.values()) + gates == 130_560
    size = sum((tmp_path / name).stat().st_size for name in (CONFIG, TENSORS))
    assert size + 4 * gates < 0.7e6


# Another precision


@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("bfloat16", "float32")])
def test_in_another_precision_the_same_backbone_takes_its_adapter_and_says_it_was_not_compared(
    tmp_path, caplog, dtypes
):
    there, here = (getattr(torch, dtype) for dtype in dtypes)
    model = adapted_toy().to(there)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["base"]["dtype"] == dtypes[0]
    fresh = adapted_toy(update_seed=9).to(here)
    load_adapter(fresh, tmp_path)
    assert f"weights in {dtypes[0]} and these are in {dtypes[1]}" in caplog.text and "not compared" in caplog.text
    assert torch.equal(fresh.mode_approx.sets["default"].P, model.mode_approx.sets["default"].P)
    caplog.clear()
    load_adapter(adapted_toy().to(there), tmp_path)
    assert not caplog.text


def test_in_one_precision_other_weights_are_refused_whatever_it_is(tmp_path):
    save_adapter(adapted_toy().half(), tmp_path)
    with pytest.raises(AuroraError, match="tuned on other weights"):
        load_adapter(adapted_toy(seed=1).half(), tmp_path)


def test_folders_that_do_not_tell_the_precision_are_of_single_precision(saved, caplog):
    model, folder = saved
    base = json.loads((folder / CONFIG).read_text())["base"]
    del base["dtype"]
    rewrite_adapter(folder, base=base)
    load_adapter(adapted_toy(update_seed=9), folder)
    assert not caplog.text
    load_adapter(adapted_toy(update_seed=9).half(), folder)
    assert "not compared" in caplog.text
    with pytest.raises(AuroraError, match="tuned on other weights"):
        load_adapter(adapted_toy(seed=1), folder)


# What does not fit


def narrow():
    model = Toy()
    model.query, model.key = nn.Linear(24, 4), nn.Linear(4, 6)
    inject_mode_approx(model, ModeApproxConfig(rank=4), TARGETS)
    return model


def shallow():
    model = Toy()
    inject_mode_approx(model, ModeApproxConfig(rank=4), ["qkv", "query"])
    return model


MISFITS = [
    (narrow, ["slot query is 24 x 6 there and 24 x 4 here", "slot key is 6 x 6 there and 4 x 6 here"]),
    (shallow, ["5 slots there and 4 here", "slot key is missing here"]),
    (lambda: adapted_toy(rank=2), ["mode_approx.rank is 4 there and 2 here", "under a new name"]),
    (lambda: adapted_toy(scale=2.0), ["mode_approx.scale is 8.0 there and 2.0 here"]),
    (lambda: adapted_toy(seed=1), ["tuned on other weights", "check_base=False (model.adapter_check_base: false)"]),
]


@pytest.mark.parametrize(("build", "words"), MISFITS, ids=["width", "depth", "rank", "scale", "base"])
def test_a_misfit_says_what_differs_and_changes_nothing(saved, build, words):
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(AuroraError) as caught:
        load_adapter(model, saved[1])
    for word in (str(saved[1]), "does not fit this model", *words):
        assert word in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_another_base_can_be_taken_all_the_same(saved):
    other = adapted_toy(seed=1, update_seed=9)
    load_adapter(other, saved[1], check_base=False)
    assert torch.equal(other.mode_approx.sets["default"].P, saved[0].mode_approx.sets["default"].P)


def edit_data(weight):
    weight.data[0, 0] += 1


def edit_by_numpy(weight):
    weight.detach().numpy()[0, 0] += 1


@pytest.mark.parametrize("change", [edit_data, edit_by_numpy])
def test_a_base_that_was_changed_in_place_is_another(saved, tmp_path, change):
    model, folder = saved
    load_adapter(model, folder)
    before = adapter_file.base_hash(model)
    change(model.key.adapted_weight)
    assert adapter_file.base_hash(model) != before
    with pytest.raises(AuroraError, match="it was tuned on other weights"):
        load_adapter(model, folder)
    save_adapter(model, tmp_path / "changed")
    with pytest.raises(AuroraError, match="it was tuned on other weights"):
        load_adapter(adapted_toy(), tmp_path / "changed")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads.head.weight": torch.ones(3, 6)}, "heads.head.weight has no place here"),
        ({"factors.P": None}, "factors.P is missing"),
        ({"factors.P": torch.ones(2, 4)}, r"factors.P is \(2, 4\), not \(5, 4\)"),
        ({"factors.P": torch.full((5, 4), torch.nan)}, "factors.P is not finite there"),
        ({"factors.P": torch.full((5, 4), 1e300, dtype=torch.float64)}, "factors.P is not finite there"),
        ({"factors.P": torch.ones(5, 4, dtype=torch.int64)}, "factors.P is of type int64, not of floating point"),
        ({"factors.P": torch.ones(5, 4, dtype=torch.complex64)}, "factors.P is of type complex64"),
        ({"factors.Q": torch.ones(5, 4)}, "factors.Q is of no slot"),
    ],
)
def test_tensors_other_than_the_settings_announce_are_named(saved, change, words):
    model, folder = saved
    tensors = {key: value for key, value in {**load_file(folder / TENSORS), **change}.items() if value is not None}
    rewrite_adapter(folder, tensors)
    with pytest.raises(AuroraError, match=words):
        load_adapter(model, folder)


def test_names_that_cannot_be_loaded_under(saved):
    model, folder = saved
    model.mode_approx.add_set("momentum", ModeApproxConfig(rank=4))
    with pytest.raises(AuroraError, match="cannot be called 'momentum', which a model keeps for its training"):
        load_adapter(model, folder, "momentum")
    merge_adapter(model)
    with pytest.raises(AuroraError, match="'default' is merged into the weights; unmerge_adapter"):
        load_adapter(model, folder)


# What cannot be read


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 3}, "rank: unknown key"),
        ({"mode_approx": {"rank": 4, "skale": 1}}, "mode_approx.skale: unknown key; did you mean 'scale'"),
        ({"mode_approx": {"rank": "4"}}, "mode_approx.rank: '4' is not a int"),
        ({"mode_approx": {"rank": 0}}, "mode_approx.rank: 0 cannot be used"),
        ({"base": {"name": "x"}}, "base.sha256: missing"),
        ({"slots": {"query": [4]}}, r"slots.query: \[4\] is not \[d_in, d_out\]"),
        ({"slots": []}, r"slots: \[\] is not a dict"),
        ({"format": 3}, "format: 3 is not 2, which this version reads; update"),
        ({"format": 3, "mode_approx": {"rnk": 4}, "more": 1}, "format: 3 is not 2, which this version reads; update"),
        (
            {"mode_approx": {"rnk": 4}, "versions": {"lavis_aurora": "99.0"}},
            ".*rnk: unknown key.*by lavis_aurora '99.0'",
        ),
        ({"base": 3}, "base: must be a section of keys, not 3"),
    ],
)
def test_a_config_with_what_is_not_known_is_refused(saved, change, words):
    model, folder = saved
    rewrite_adapter(folder, **change)
    with pytest.raises(AuroraError, match=f"{CONFIG}: {words}"):
        load_adapter(model, folder)


def test_folders_that_are_none(saved, tmp_path):
    model, folder = saved
    with pytest.raises(AuroraError, match=f"{tmp_path} is no adapter folder: it has no {CONFIG}"):
        load_adapter(model, tmp_path)
    with pytest.raises(AuroraError, match=f"there is none of this name; beside it is {folder.name}"):
        load_adapter(model, folder.with_name("typo"))
    for name in (CONFIG, TENSORS):
        with pytest.raises(AuroraError, match="it is a file of one; name its folder"):
            load_adapter(model, folder / name)
    (tmp_path / "checkpoint_best.pth").touch()
    with pytest.raises(AuroraError, match=r"it is a file; .*named by run\.resume_ckpt_path=FILE"):
        load_adapter(model, tmp_path / "checkpoint_best.pth")
    (folder / TENSORS).unlink()
    with pytest.raises(AuroraError, match=f"{TENSORS} cannot be read"):
        load_adapter(model, folder)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("older", [False, True])
def test_nothing_is_unpickled(saved, tmp_path, monkeypatch, older):
    monkeypatch.chdir(tmp_path)
    model, folder = saved
    content = pickle.dumps(Trap())
    if older:
        as_format_1(folder, tensors_sha256=hashlib.sha256(content).hexdigest())
    (folder / TENSORS).write_bytes(content)
    with pytest.raises(AuroraError, match="not a readable safetensors"):
        load_adapter(model, folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_write_leaves_the_old_adapter(saved, monkeypatch, failing):
    """The disk fills up at the first or at the second file."""
    model, folder = saved
    expected = model(inputs())
    randomize(model, "default", 20)
    real, calls = os.fsync, iter(range(1, 9))

    def full(descriptor):
        if next(calls) == failing:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AuroraError, match="cannot write .*No space left"):
        save_adapter(model, folder)
    assert {p.name for p in folder.iterdir()} == {CONFIG, TENSORS}
    fresh = adapted_toy(update_seed=4)
    load_adapter(fresh, folder)
    assert torch.equal(fresh(inputs()), expected)


def test_files_of_two_adapters_are_no_adapter(saved, tmp_path):
    model, folder = saved
    randomize(model, "default", 20)
    save_adapter(model, tmp_path / "other")
    (tmp_path / "other" / TENSORS).replace(folder / TENSORS)
    with pytest.raises(AuroraError, match=f"{TENSORS} is not the file that {CONFIG} beside it belongs to"):
        load_adapter(model, folder)


def test_what_is_not_finite_is_not_written(saved, tmp_path):
    model, _ = saved
    with torch.no_grad():
        model.mode_approx.sets["default"].P[0, 0] = float("nan")
    with pytest.raises(AuroraError, match="factors.P: not finite"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(AuroraError, match="plain JSON values"):
        save_adapter(adapted_toy(), tmp_path / "new", metrics={"r1": float("nan")})
    assert not (tmp_path / "new").exists()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(0, 999), st.sampled_from([0.5, 8.0]), st.sampled_from(["global", "tower"]))
def test_any_adapter_survives_its_folder_bit_for_bit(rank, seed, scale, sharing):
    model = adapted_toy(rank, update_seed=seed, scale=scale, sharing=sharing)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        fresh = adapted_toy(rank=1, update_seed=seed + 1)
        load_adapter(fresh, folder, "loaded")
        set_adapter(fresh, "loaded")
        assert torch.equal(fresh(inputs()), model(inputs()))
        save_adapter(fresh, f"{folder}/again")
        first, again = (load_file(f"{path}/{TENSORS}") for path in (folder, f"{folder}/again"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
