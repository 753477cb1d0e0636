"""Adapters compared and added from their folders: against plain sums of their whole updates."""

import json
import re

import pytest
import torch
from tiny import activate, tiny_model
from tiny_vqa import vqa_model
from toy import adapted_toy, rewrite_adapter

from lavis_aurora import AuroraError, load_adapter, merged_state_dict, save_adapter, set_adapter
from lavis_aurora.adapters.arithmetic import compare_updates, merge_adapters
from lavis_aurora.adapters.config import read_adapter
from lavis_aurora.cli import diff, inspect
from lavis_aurora_cli import main

GATELESS = {"gate": {"form": "none"}}
WEIGHTS = "${aurora.package:configs/models/tiny/model.safetensors}"


def saved(model, folder):
    save_adapter(model, folder)
    return folder


def update(model) -> dict[str, torch.Tensor]:
    """dW of each weight of a toy."""
    return {name: model.get_submodule(name).delta_weight().detach() for name in ("qkv", "query", "key")}


def toys(tmp_path, *settings: dict):
    models = [adapted_toy(update_seed=i, **one) for i, one in enumerate(settings, 1)]
    return models, [saved(model, tmp_path / f"a{i}") for i, model in enumerate(models)]


@pytest.mark.parametrize("sharing", ["global", "tower"])
@pytest.mark.parametrize("weights", [None, [0.5, -2.0, 1.25]])
def test_a_sum_is_exactly_the_sum_of_the_updates(tmp_path, sharing, weights):
    """Of adapters of other ranks and scales."""
    settings = ({"rank": 4}, {"rank": 2, "scale": 3.0}, {"rank": 3, "scale": 0.5})
    models, folders = toys(tmp_path, *({**one, "sharing": sharing} for one in settings))
    said = merge_adapters(folders, tmp_path / "sum", weights)
    assert "exactly, of rank 9" in said[0]
    target = adapted_toy(rank=4, sharing=sharing)
    load_adapter(target, tmp_path / "sum", "sum")
    set_adapter(target, "sum")
    updates = [update(model) for model in models]
    for name in updates[0]:
        expected = sum(w * one[name] for w, one in zip(weights or [1 / 3] * 3, updates))
        found = target.get_submodule(name).delta_weight("sum").detach()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_of_equal_factors_the_rank_stays(tmp_path):
    first, second = adapted_toy(update_seed=1), adapted_toy(update_seed=1)
    with torch.no_grad():
        factors = second.mode_approx.sets["default"]
        factors.P.normal_()
        factors.coefficients.normal_()
    folders = [saved(first, tmp_path / "a"), saved(second, tmp_path / "b")]
    assert "of rank 4" in merge_adapters(folders, tmp_path / "sum", [2.0, 0.5])[0]
    target = adapted_toy(update_seed=9)
    load_adapter(target, tmp_path / "sum")
    for name, delta in update(target).items():
        expected = 2 * update(first)[name] + 0.5 * update(second)[name]
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tuning", ["aurora", "lora"])
def test_a_sum_is_loaded_by_the_model_that_it_names(tmp_path, tuning):
    """With its own rank, and with heads averaged."""
    method = {"mode_approx": {"rank": 4}, **GATELESS} if tuning == "aurora" else {"lora": {"rank": 3, "alpha": 5.0}}
    context = {} if tuning == "aurora" else {"context": {"form": "none"}}
    models = [activate(tiny_model(tuning=tuning, **method, **context), seed=i).eval() for i in (1, 2)]
    with torch.no_grad():
        models[1].itm_head.weight.add_(1.0)
    folders = [saved(model, tmp_path / str(i)) for i, model in enumerate(models)]
    main(["merge-adapters", *map(str, folders), "--weights", "0.25", "0.75", "--out", str(tmp_path / "sum")])
    settings = read_adapter(tmp_path / "sum")[0].model["settings"]
    section = "mode_approx" if tuning == "aurora" else "lora"
    assert settings[section]["rank"] == (8 if tuning == "aurora" else 6)
    merged = tiny_model(tuning=tuning, **context, **{**method, section: settings[section]})
    load_adapter(merged, tmp_path / "sum")
    states = [merged_state_dict(model) for model in (*models, merged)]
    for key in states[2]:
        if "_m." not in key and "queue" not in key:
            expected = 0.25 * states[0][key] + 0.75 * states[1][key]
            torch.testing.assert_close(states[2][key].double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_gates_are_averaged_and_never_added(tmp_path):
    folders = [saved(activate(vqa_model(mode_approx={"rank": 2}), seed=i), tmp_path / str(i)) for i in (1, 2)]
    with pytest.raises(AuroraError, match=r"gate\..* differ and are no updates.*whose sum is 1, not 2"):
        merge_adapters(folders, tmp_path / "sum", [1, 1])
    said = merge_adapters(folders, tmp_path / "sum")
    assert "Averaged, as they are no updates: gate." in said[1]
    parts = [read_adapter(folder)[1] for folder in (*folders, tmp_path / "sum")]
    for key in parts[0]:
        if key.startswith("gate."):
            torch.testing.assert_close(parts[2][key], (parts[0][key] + parts[1][key]) / 2)


def test_what_cannot_be_added_is_refused_with_what_differs(tmp_path):
    [_, _], [a, b] = toys(tmp_path, {"rank": 2}, {"rank": 2, "sharing": "tower"})
    with pytest.raises(AuroraError, match="mode_approx.sharing differs"):
        merge_adapters([a, b], tmp_path / "sum")
    other = saved(adapted_toy(seed=7), tmp_path / "other")
    with pytest.raises(AuroraError, match=r"a0 and .*other cannot be added: they were tuned on other backbones"):
        merge_adapters([a, other], tmp_path / "sum")
    rewrite_adapter(b, model={"arch": "another"}, slots=dict(reversed(read_adapter(b)[0].slots.items())))
    with pytest.raises(AuroraError, match=r"update other weights \(slots\); arch is None in the one and 'another'"):
        merge_adapters([a, b], tmp_path / "sum")
    for folders, weights, words in (
        ([a], None, "name two or more"),
        ([a, a], [0.5, float("nan")], r"--weights: \[0.5, nan\] cannot be used; it must be a finite number for each"),
        ([a, a], [float("inf"), 0.0], "--weights: .* a finite number"),
        ([a, a], [1.0], "--weights: 1 for 2 adapters"),
        ([a, tmp_path], None, "no adapter folder"),
    ):
        with pytest.raises(AuroraError, match=words):
            merge_adapters(folders, tmp_path / "sum", weights)
    with pytest.raises(AuroraError, match="is there already"):
        merge_adapters([a, a], a)
    assert not (tmp_path / "sum").exists()


def test_adapters_of_other_layers_are_not_said_to_be_of_other_backbones(tmp_path):
    """The hash is of the weights that are adapted, so that it differs with them."""
    settings = {"pretrained": WEIGHTS, **GATELESS}
    first, second = (
        saved(tiny_model(mode_approx={"rank": 2, **one}, **settings), tmp_path / str(i))
        for i, one in enumerate(({}, {"layers": {"last": 1}}))
    )
    with pytest.raises(AuroraError, match=r"cannot be added: they update other weights \(slots\)$"):
        merge_adapters([first, second], tmp_path / "sum")
    said = diff(str(first), str(second))
    assert "They update other weights: their hashes do not tell" in said and "other backbones" not in said


@pytest.mark.parametrize("changes", [{"token_merging": 2}, {"embed_dim": 32}, {"vit_layer_norm_epsilon": 1e-5}])
def test_backbones_that_compute_otherwise_cannot_be_added(tmp_path, changes):
    folders = [saved(tiny_model(**GATELESS, **one), tmp_path / str(len(one))) for one in ({}, changes)]
    [key] = changes
    with pytest.raises(AuroraError, match=f"settings.{key} is None in the one and {changes[key]} in the other"):
        merge_adapters(folders, tmp_path / "sum")


def test_heads_of_other_shapes_are_refused(tmp_path):
    folders = [saved(tiny_model(**GATELESS, **one), tmp_path / str(len(one))) for one in ({}, {"embed_dim": 32})]
    for folder in folders:
        rewrite_adapter(folder, model={})
    with pytest.raises(AuroraError, match="heads.text_proj.bias, .* differ in shape; they cannot be averaged"):
        merge_adapters(folders, tmp_path / "sum")


def test_of_a_sum_that_cannot_be_written_nothing_is_left(tmp_path, monkeypatch):
    [_], [a] = toys(tmp_path, {"rank": 2})

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(AuroraError, match="cannot write .*No space left"):
        merge_adapters([a, a], tmp_path / "sum")
    assert [path.name for path in tmp_path.iterdir()] == ["a0"]


def test_what_is_no_update_can_be_neither_added_nor_compared(tmp_path):
    bottleneck = tiny_model(tuning="uniadapter", uniadapter={"rank": 4}, context={"form": "none"})
    folder = saved(bottleneck, tmp_path / "uni")
    for action in (lambda: merge_adapters([folder, folder], tmp_path / "sum"), lambda: diff(folder, folder)):
        with pytest.raises(AuroraError, match="an adapter of uniadapter is no update of weights"):
            action()


def test_norms_and_cosines_are_those_of_the_whole_updates(tmp_path):
    models, folders = toys(tmp_path, {"rank": 4}, {"rank": 2, "scale": 3.0})
    found = compare_updates(*map(read_adapter, folders))
    slots = {"qkv.query": ("qkv", 0), "qkv.key": ("qkv", 1), "qkv.value": ("qkv", 2), "query": ("query", 0)}
    for slot, (layer, part) in {**slots, "key": ("key", 0)}.items():
        rows = slice(8 * part, 8 * part + 8) if layer == "qkv" else slice(None)
        a, b = (update(model)[layer][rows] for model in models)
        norms = (a.norm().item(), b.norm().item(), (a - b).norm().item())
        assert found[slot].norms == pytest.approx(norms, rel=1e-4)
        cosine = torch.cosine_similarity(a.flatten(), b.flatten(), 0).item()
        assert found[slot].cosine == pytest.approx(cosine, abs=1e-5)


def test_the_command_tells_settings_towers_layers_and_gates(tmp_path, capsys):
    folders = [
        saved(activate(vqa_model(mode_approx={"rank": rank}), seed=rank), tmp_path / str(rank)) for rank in (2, 3)
    ]
    main(["diff", *map(str, folders)])
    out = capsys.readouterr().out
    assert "mode_approx: A rank 2, scale 8.0" in out and "B rank 3, scale 8.0" in out and "base" not in out
    rows = {tuple(line.split()[:2]) for line in out.splitlines() if line.startswith(("text_encoder", "visual"))}
    tower = "text_encoder.encoder.layer.*.crossattention.self"
    assert {(tower, "0"), (tower, "1"), (tower, "all"), ("visual_encoder.blocks.*.attn.qkv", "2")} <= rows
    assert re.search(r"gate\.text_encoder\.encoder\.layer\.\*\.\S+gamma +\d", out)
    same = diff(str(folders[0]), str(folders[0])).splitlines()
    assert all(line.split()[-2:] == ["0", "1.0000"] for line in same if line.startswith(("visual", "text", "gate")))


def test_slots_of_one_alone_and_other_backbones_are_said(tmp_path):
    [_], [a] = toys(tmp_path, {"rank": 2})
    other = saved(tiny_model(mode_approx={"rank": 2}), tmp_path / "tiny")
    said = diff(str(a), str(other))
    assert "only in A: 5 slots, qkv.query" in said and "only in B: 27 slots" in said
    assert "They update other weights" in said and "base: A without a name" in said
    again = diff(str(a), str(saved(adapted_toy(seed=7), tmp_path / "seven")))
    assert "They are of other backbones" in again


def test_inspect_lists_the_adapters_of_a_folder(tmp_path):
    folder = saved(tiny_model(mode_approx={"rank": 2}), tmp_path / "run1" / "adapter_best")
    metrics = {"metrics": {"val": {"text_to_image_r1": 12.3456}}}
    rewrite_adapter(folder, **metrics)
    (tmp_path / "run2" / "adapter_last").mkdir(parents=True)
    (tmp_path / "run2" / "adapter_last" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "run2" / "adapter_last" / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()
    )
    first, second = inspect(str(tmp_path)).splitlines()
    assert "run1/adapter_best" in first and "blip_retrieval_aurora tiny; mode_approx: rank 2" in first
    assert "; slots 27 of 128 x 128; base" in first and "nested" not in first
    assert "val: text_to_image_r1 12.35" in first
    assert "run2/adapter_last" in second


def test_nested_training_is_described_where_it_was_done(tmp_path):
    folder = saved(adapted_toy(nested=True, nested_ranks=[1, 2]), tmp_path / "nested")
    assert "nested True, nested_ranks [1, 2], nested_steps growing" in inspect(str(folder))


def test_an_adapter_of_peft_is_named_as_such(tmp_path):
    from lavis_aurora.adapters.export import export_lora

    export_lora(adapted_toy(), tmp_path / "lora")
    with pytest.raises(AuroraError, match="it is an adapter of peft .'LORA'.; load it by peft.PeftModel"):
        load_adapter(adapted_toy(), tmp_path / "lora")
