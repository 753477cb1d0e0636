"""Figures of runs: attention, distribution, cases."""

from __future__ import annotations

import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tiny import activate, project_yaml, tiny_model
from tiny_figures import arguments, with_candidates

from lavis_aurora.analysis import examples
from lavis_aurora.analysis.examples import ATTENTION, CASES, word_maps
from lavis_aurora.analysis.results import load_trained, split_data, untrained_model
from lavis_aurora.analysis.weights import DISTRIBUTION, TOWERS, stacked
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.paths import PACKAGE_ROOT
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.project import load_config


@pytest.mark.parametrize("form", ["none", "residual", "affine"])
def test_maps_are_the_softmax_of_query_and_key(form):
    """Against LAVIS's equation from the hidden states that the layer reads."""
    model = activate(tiny_model(gate={"form": form})).eval()
    image = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    seen = {}
    cross = model.text_encoder.encoder.layer[1].crossattention.self
    hook = cross.register_forward_hook(lambda _m, inputs, _o: seen.update(hidden=inputs[0], image=inputs[3]))
    words, maps, layer = word_maps(model, image, "a big red circle", 1)
    hook.remove()
    assert words == ["a", "big", "red", "circle"] and layer == 1 and maps.shape == (4, 3, 3)
    with torch.no_grad():
        query, key = cross.query(seen["hidden"]), cross.key(seen["image"])
    heads, width = cross.num_attention_heads, cross.attention_head_size
    plain = torch.zeros(query.shape[1], key.shape[1])
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        plain += torch.softmax(query[0, :, part] @ key[0, :, part].T / width**0.5, dim=-1) / heads
    # Without [ENC] and [SEP], and without the picture's [CLS].
    np.testing.assert_allclose(maps.reshape(4, 9), plain[1:5, 1:], atol=1e-6)


def test_attention_has_a_picture_and_a_panel_for_each_word(retrieval_runs):
    runs = retrieval_runs.values()
    numbers = ATTENTION.numbers(arguments(ATTENTION, *runs, "--text", "a big red circle", "--labels", "one", "two"))
    assert [row["label"] for row in numbers["rows"]] == ["one", "two"]
    figure = ATTENTION.draw(numbers)
    assert len(figure.axes) == 2 * 5
    overlay = figure.axes[1].images[1].get_array()
    np.testing.assert_allclose(overlay, numbers["rows"][0]["maps"][0])
    chosen = ATTENTION.numbers(arguments(ATTENTION, *runs, "--text", "a big red circle", "--words", "red"))
    assert chosen["rows"][0]["words"] == ["red"]
    assert chosen["rows"][0]["maps"] == [numbers["rows"][0]["maps"][2]]
    relative = ATTENTION.numbers(arguments(ATTENTION, *runs, "--text", "a big red circle", "--relative"))
    maps = np.asarray(numbers["rows"][0]["maps"])
    np.testing.assert_allclose(relative["rows"][0]["maps"], np.maximum(maps - maps.mean(axis=0), 0), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--layer", "7"], "3 layers"),
        (["--picture", "99"], "--picture 99"),
        (["--words", "nothing"], "--words nothing"),
        (["--split", "tset"], "no split 'tset'"),
        (["--labels", "a", "b"], "2 names for 1 runs"),
    ],
)
def test_what_attention_cannot_show_is_named(retrieval_runs, given, match):
    with pytest.raises(AuroraError, match=match):
        ATTENTION.numbers(arguments(ATTENTION, retrieval_runs["aurora"], *given))


def test_maps_are_those_of_retrieval(answer_runs):
    with pytest.raises(AuroraError, match="a run of blip_vqa_aurora; maps of words are those of blip_retrieval"):
        ATTENTION.numbers(arguments(ATTENTION, answer_runs[0]))


def test_a_run_is_drawn_after_clone_and_checkpoint_have_moved(retrieval_runs, tmp_path, caplog):
    """Its configuration names packaged files; those of older versions did so by absolute paths."""
    text = (retrieval_runs["aurora"] / "config.yaml").read_text()
    assert str(PACKAGE_ROOT) not in text
    (tmp_path / "config.yaml").write_text(text)
    expected = untrained_model(tmp_path).visual_encoder.state_dict()
    gone = f"  resume_ckpt_path: {tmp_path / 'gone.pth'}"
    text = re.sub(r"\$\{aurora.package:(\S+)\}", r"/old/lavis_aurora/\1", text)
    (tmp_path / "config.yaml").write_text(text.replace("  resume_ckpt_path: null", gone))
    assert gone in (tmp_path / "config.yaml").read_text() and "own files are taken" not in caplog.text
    found = untrained_model(tmp_path).visual_encoder.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    [record] = [one for one in caplog.records if "own files are taken" in one.message]
    assert "/old/lavis_aurora/configs/models/tiny/med_config.json" in record.message
    assert split_data(tmp_path, "val")
    for key in ("pretrained", "med_config_path"):
        lines = [f"  {key}: /old/x" if one.startswith(f"  {key}:") else one for one in text.splitlines()]
        (tmp_path / "config.yaml").write_text("\n".join(lines))
        with pytest.raises(AuroraError, match=f"config.yaml: model.{key}: no such file: /old/x; name it where it"):
            untrained_model(tmp_path)


def test_a_wrapped_model_has_the_weights_of_the_one_inside(tmp_path):
    """Its weights are named below model.base."""

    def resolved(**base) -> None:
        yaml = project_yaml(tmp_path)
        config = OmegaConf.load(yaml)
        inside = {"arch": "blip_retrieval_aurora", "model_type": "tiny", **base}
        config.model = {"arch": "mode_approx", "base": inside, "mode_approx": {"rank": 4}}
        OmegaConf.save(config, yaml)
        OmegaConf.save(load_config(str(yaml)).config, tmp_path / "config.yaml")

    defaults = OmegaConf.load(BlipRetrievalAurora.default_config_path("tiny")).model
    name = "text_encoder.embeddings.word_embeddings.weight"
    resolved()
    found = untrained_model(tmp_path).state_dict()[f"base.{name}"]
    assert torch.equal(found, load_file(defaults.pretrained)[name].float())
    resolved(pretrained=None)
    with pytest.raises(AuroraError, match="random weights, which are lost"):
        untrained_model(tmp_path)


def test_distributions_are_those_of_the_weights(retrieval_runs):
    numbers = DISTRIBUTION.numbers(arguments(DISTRIBUTION, *retrieval_runs.values()))
    model = untrained_model(retrieval_runs["aurora"])
    before = [layer.crossattention.self.query.weight.detach() for layer in model.text_encoder.encoder.layer]
    only = stacked(model, ["cross"], None)["query"]
    np.testing.assert_array_equal(only, torch.cat([weight.flatten() for weight in before]).numpy())
    # W_q of all towers, from the fused weights of the vision encoder too: 3 towers, 3 layers, 128 x 128.
    query = stacked(model, list(TOWERS), None)["query"]
    assert query.shape == (9 * 128 * 128,)
    found = numbers["kinds"]["query"]
    assert found["deviation"]["pretrained"] == pytest.approx(query.std())
    load_trained(model, retrieval_runs["aurora"])
    changes = [model.mode_approx.delta_weight(slot).detach() for slot in model.mode_approx.slots if "query" in slot]
    expected = float(torch.cat([change.flatten() for change in changes]).std(correction=0))
    assert found["change_deviation"]["aurora"] == pytest.approx(expected, rel=1e-4) and expected > 0
    assert set(found["changes"]) == {"aurora", "full"}
    widths = np.diff(found["edges"])
    assert 0.99 < (np.asarray(found["weights"]["pretrained"]) * widths).sum() <= 1
    figure = DISTRIBUTION.draw(numbers)
    assert len(figure.axes) == 6
    assert [len(axis.patches) for axis in figure.axes] == [3, 2] * 3


def test_a_backbone_of_random_weights_is_lost(answer_runs):
    with pytest.raises(AuroraError, match="random weights, which are lost"):
        DISTRIBUTION.numbers(arguments(DISTRIBUTION, answer_runs[0]))


def test_distributions_of_one_layer_or_none(retrieval_runs):
    run = retrieval_runs["aurora"]
    one = DISTRIBUTION.numbers(arguments(DISTRIBUTION, run, "--layers", "1", "--towers", "text"))
    assert one["layers"] == [1] and set(one["kinds"]["key"]["changes"]) == {"aurora"}
    with pytest.raises(AuroraError, match="no such layer"):
        DISTRIBUTION.numbers(arguments(DISTRIBUTION, run, "--layers", "9"))
    with pytest.raises(AuroraError, match="at most one run of aurora"):
        DISTRIBUTION.numbers(arguments(DISTRIBUTION, run, run))


def test_ranked_pictures_are_those_of_the_result_file(retrieval_runs):
    run = retrieval_runs["aurora"]
    result = with_candidates(run)
    numbers = CASES.numbers(arguments(CASES, run, "--items", "0", "5", "--top", "3"))
    first, second = numbers["cases"]
    ids = result["candidates"]["text_to_image"]["ids"]
    assert [one["file"].rpartition("/")[2] for one in first["candidates"]] == [f"{i:03d}.jpg" for i in ids[0][:3]]
    assert [one["right"] for one in second["candidates"]] == [i == 5 for i in ids[5][:3]]
    assert second["rank"] == result["ranks"]["text_to_image"][5] + 1
    figure = CASES.draw(numbers)
    assert len(figure.axes) == 2 * 4
    with pytest.raises(AuroraError, match="--items 8"):
        CASES.numbers(arguments(CASES, run, "--items", "8"))
    with pytest.raises(AuroraError, match="name one"):
        CASES.numbers(arguments(CASES, run, run))
    for name in ("count", "top"):
        with pytest.raises(AuroraError, match=f"--{name} 0: must be 1 or more"):
            CASES.numbers(arguments(CASES, run, f"--{name}", "0"))


def test_answers_of_two_runs_stand_under_their_questions(answer_runs):
    numbers = CASES.numbers(arguments(CASES, *answer_runs, "--split", "val", "--labels", "A", "B", "--count", "2"))
    assert numbers["questions"] == 6 and len(numbers["cases"]) == 2
    given = [json.loads((run / "result" / "val_epoch_best_vqa_result.json").read_text()) for run in answer_runs]
    for case in numbers["cases"]:
        key = 4_000_000_000 + case["item"]
        assert case["answers"] == [next(o["answer"] for o in one if o["question_id"] == key) for one in given]
        assert case["truth"] == ("red", "2", "yes")[case["item"] % 3]
    differing = sum(a["answer"] != b["answer"] for a, b in zip(*given))
    assert numbers["differing"] == differing
    figure = CASES.draw(numbers)
    assert len(figure.axes) == 2
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == [f"{x}: {y}" for x, y in zip("AB", numbers["cases"][0]["answers"])] + [
        f"true: {numbers['cases'][0]['truth']}"
    ]


def test_an_id_that_is_another_questions_number_is_no_match(tmp_path, monkeypatch):
    """The demo's ids are 0, 1, 2, 100, ...: that of its fourth question is the number of its hundredth."""
    entries = [{"instance_id": str(i), "question_id": 3 - i, "question": f"is it {3 - i}?"} for i in range(4)]
    dataset = SimpleNamespace(annotation=entries, file=str)
    monkeypatch.setattr(examples, "split_data", lambda *_: dataset)
    monkeypatch.setattr(examples, "read_config", lambda _: OmegaConf.create({"model": {"arch": "blip_vqa_aurora"}}))
    (tmp_path / "result").mkdir()
    result = tmp_path / "result" / "test_epoch_best_vqa_result.json"
    result.write_text(json.dumps([{"question_id": i, "answer": str(i)} for i in range(4)]))
    # What is written last, for run.rank, is of a part of the adapter.
    cut = [{"question_id": i, "answer": "cut"} for i in range(4)]
    (tmp_path / "result" / "test_epoch_rank_4_vqa_result.json").write_text(json.dumps(cut))
    os.utime(result, (0, 0))
    cases = CASES.numbers(arguments(CASES, tmp_path))["cases"]
    assert [case["answers"] for case in cases] == [["3"], ["2"], ["1"], ["0"]]
    assert [case["question"] for case in cases] == [f"is it {i}?" for i in (3, 2, 1, 0)]
