"""BLIP as ONNX files, run by onnxruntime alone."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from lavis_models import build, hub_folder
from omegaconf import OmegaConf
from PIL import Image
from tiny import activate, med_config, tiny_model
from tiny_vqa import vqa_model

from lavis_aurora import AuroraError, ModeApproxConfig, load_model_and_preprocess, merged_state_dict, save_adapter
from lavis_aurora.common.paths import package_file
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.models.mode_approx_model import ModeApproxModel
from lavis_aurora.models.onnx import export_onnx
from lavis_aurora_cli import main

pytest.importorskip("onnxscript", reason='pip install "lavis-aurora[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='pip install "lavis-aurora[onnx]"')

GATELESS = {"gate": {"form": "none"}, "mode_approx": {"rank": 4}}
TEXTS = ["a red circle", "a big blue square and a small star", "a star"]


def run(folder: Path, name: str, **inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(inputs)
    return session.run(None, inputs)


@torch.no_grad()
def check(model, folder: Path, side: int, atol: float = 1e-4) -> None:
    """Scores of other batches, lengths and numbers of tokens than those that it was exported with."""
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(3))
    expected = model.match(images, TEXTS)
    tokenized = model.tokenizer(TEXTS, padding=True, return_tensors="np")
    text = {key: tokenized[key] for key in ("input_ids", "attention_mask")}
    feature, tokens = run(folder, "image_tower", pixel_values=images.numpy())
    [words] = run(folder, "text_tower", **text)
    np.testing.assert_allclose(feature @ words.T, expected.itc, rtol=0, atol=atol)
    pairs = {"tokens": np.repeat(tokens, 3, axis=0), **{key: np.tile(value, (3, 1)) for key, value in text.items()}}
    [scores] = run(folder, "matching", **pairs)
    np.testing.assert_allclose(scores.reshape(3, 3), expected.itm, rtol=0, atol=atol)
    # One picture, one short text.
    one = {key: value[:1, : text["attention_mask"][0].sum()] for key, value in text.items()}
    [score] = run(folder, "matching", tokens=tokens[:1], **one)
    np.testing.assert_allclose(score, expected.itm[0, :1], rtol=0, atol=atol)
    # A video of two frames.
    video = torch.stack([images[0], images[1]], dim=1)[None]
    [score] = run(folder, "matching", tokens=tokens[:2].reshape(1, -1, tokens.shape[2]), **one)
    np.testing.assert_allclose(score, model.match(video, TEXTS[:1]).itm[0], rtol=0, atol=atol)


def test_a_merged_model_scores_as_here_and_stays_as_it_was(tmp_path):
    # Of one layer a tower; the slow tests have more.
    shallow = {"vit": {"depth": 1}, "med_config_path": med_config(tmp_path, num_hidden_layers=1)}
    model = activate(tiny_model(**GATELESS, **shallow)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert export_onnx(model, tmp_path / "out") == ["image_tower.onnx", "text_tower.onnx", "matching.onnx"]
    assert model.training and model.mode_approx.merged is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    check(model, tmp_path / "out", 48)


@pytest.fixture
def adapter(tmp_path):
    settings = OmegaConf.merge(OmegaConf.load(BlipRetrievalAurora.default_config_path("tiny")).model, GATELESS)
    model = activate(BlipRetrievalAurora.from_config(settings), std=0.05).eval()
    save_adapter(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.mark.slow
def test_the_command_writes_a_folder_whose_card_can_be_run(adapter, tmp_path, capsys, monkeypatch):
    model, folder = adapter
    main(["export", str(folder), str(tmp_path / "out"), "--to", "onnx"])
    said, card = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    assert "library_name: onnx" in card and re.search(r"image_tower.onnx \d+ MB, text_tower.onnx \d+ MB", said)
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    pixels = torch.randint(0, 256, (60, 80, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scope = {"image": Image.fromarray(pixels.numpy())}
    monkeypatch.chdir(tmp_path)
    exec(code, scope)
    _, vis, _ = load_model_and_preprocess("blip_retrieval_aurora", "tiny")
    expected = model.match(vis["eval"](scope["image"]).unsqueeze(0), ["a red circle"])
    np.testing.assert_allclose(scope["itc"], expected.itc, rtol=0, atol=1e-4)
    np.testing.assert_allclose(scope["itm"], expected.itm[0], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_merged_tokens_are_merged_there_too(tmp_path):
    model = activate(tiny_model(token_merging=1, **GATELESS)).eval()
    export_onnx(model, tmp_path / "out")
    check(model, tmp_path / "out", 48)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blip_retrieval", "blip_image_text_matching"])
def test_models_of_lavis_itself(tmp_path, monkeypatch, name):
    monkeypatch.chdir(hub_folder(tmp_path / "hub"))
    plain = build(name)
    model = activate(ModeApproxModel(copy.deepcopy(plain), ModeApproxConfig(rank=4, targets=name)), std=0.1).eval()
    export_onnx(model, tmp_path / "out")
    cls = registry.get_model_class("blip_image_text_matching")
    scorer = cls(plain.visual_encoder, plain.text_encoder, embed_dim=16).eval()
    state = merged_state_dict(model)
    scorer.load_state_dict({key: value for key, value in state.items() if key in scorer.state_dict()})
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    samples, tokenizer = {"image": images, "text_input": TEXTS[:1]}, scorer.tokenizer
    text = {key: tokenizer(TEXTS[:1], return_tensors="np")[key] for key in ("input_ids", "attention_mask")}
    feature, tokens = run(tmp_path / "out", "image_tower", pixel_values=images.numpy())
    [words] = run(tmp_path / "out", "text_tower", **text)
    [score] = run(tmp_path / "out", "matching", tokens=tokens, **text)
    with torch.no_grad():
        itc, itm = (scorer(samples, match_head=head) for head in ("itc", "itm"))
    np.testing.assert_allclose(feature @ words.T, itc, rtol=0, atol=1e-4)
    np.testing.assert_allclose(score, itm.softmax(dim=1)[:, 1], rtol=0, atol=1e-4)


def test_what_cannot_be_exported_says_why(tmp_path, monkeypatch):
    for model, words in (
        (tiny_model(), "the gates cannot be folded into weights: tune with model.gate.form: none to export ONNX"),
        (vqa_model(**GATELESS), "ONNX: answers are found by a loop over the decoder"),
        (tiny_model(**GATELESS).half(), "ONNX: the model is not in single precision"),
        (tiny_model(tuning="uniadapter", uniadapter={"rank": 2}), "is no update of weights and cannot be merged"),
    ):
        with pytest.raises(AuroraError, match=words):
            export_onnx(model, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(AuroraError, match=r'pip install "lavis-aurora\[onnx\]"'):
            export_onnx(tiny_model(**GATELESS), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_blip_base(tmp_path):
    """All of its shapes, with random weights and any vocabulary."""
    small = {"pretrained": None, "tokenizer": package_file("configs/models/tiny"), "queue_size": 0}
    cfg = OmegaConf.merge(OmegaConf.load(BlipRetrievalAurora.default_config_path("base")).model, GATELESS, small)
    model = activate(BlipRetrievalAurora.from_config(cfg), std=0.05).eval()
    export_onnx(model, tmp_path / "out")
    check(model, tmp_path / "out", cfg.image_size)
