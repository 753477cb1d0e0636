"""Laws of the question answering model, against LAVIS's own blip_vqa."""

from __future__ import annotations

import copy

import pytest
import torch
from lavis.models.blip_models.blip_vqa import BlipVQA
from lavis.models.med import XBertLMHeadDecoder
from omegaconf import OmegaConf
from tiny import activate
from tiny_vqa import ANSWERS, BEAMS, GREEDY, QUESTIONS, RANK, vqa_batch, vqa_config, vqa_model
from torch import nn

from lavis_aurora import AuroraError, load_model_and_preprocess
from lavis_aurora.adapters.companions import adapter_parameters
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.models import VqaAuroraConfig
from lavis_aurora.encoders.towers import build_text_encoder, build_tokenizer, build_vision_encoder
from lavis_aurora.mode_approx.layers import ModeApproxLinear
from lavis_aurora.models.blip_vqa_aurora import BlipVqaAurora

LAYERS, WIDTH = 3, 128


def lavis_twin(model: BlipVqaAurora) -> BlipVQA:
    """LAVIS's model with the same weights, its own decoder and no part of ours."""
    cfg = parse_config(VqaAuroraConfig, vqa_config(), "model")

    class Plain(BlipVQA):
        @classmethod
        def init_tokenizer(cls):
            return build_tokenizer(cfg.tokenizer)

    vision = build_vision_encoder(cfg)
    text = build_text_encoder(cfg, vision.vision_width)
    twin = Plain(vision, text, XBertLMHeadDecoder.from_config(OmegaConf.structured(cfg)))
    keys = twin.load_state_dict(model.state_dict(), strict=False)
    assert not keys.missing_keys
    assert all("mode_approx." in key or ".gate." in key for key in keys.unexpected_keys)
    return twin.eval()


# Law 1


@pytest.mark.parametrize("tuning", ["aurora", pytest.param("full", marks=pytest.mark.slow), "frozen"])
@torch.no_grad()
def test_loss_and_answers_at_step_0_are_lavis(tuning):
    model = vqa_model(tuning=tuning).eval()
    twin = lavis_twin(model)
    for seed in range(2 if tuning == "aurora" else 1):
        samples = vqa_batch(seed=seed)
        torch.testing.assert_close(model(samples).loss, twin(dict(samples)).loss, atol=1e-5, rtol=0)
        for method in (GREEDY, BEAMS, RANK):
            assert model.predict_answers(samples, **method) == twin.predict_answers(dict(samples), **method)


# Laws 4 and 5


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("gate", ["residual", "affine"])
def test_only_the_adapter_changes(share, gate):
    model = vqa_model(share_decoder=share, gate={"form": gate}).train()
    before = copy.deepcopy(model.state_dict())
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        model(vqa_batch(seed=step)).loss.backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {names[id(p)] for _, p in adapter_parameters(model)}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("rank", [1, 5, 64])
@pytest.mark.parametrize(("share", "towers"), [(True, 9), (False, 15)])
def test_parameter_count(rank, share, towers):
    """9L * 2r + 2dr + 2Ld (appendix E); six more slots a layer if the decoder has its own."""
    model = vqa_model(mode_approx={"rank": rank}, share_decoder=share)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == towers * LAYERS * 2 * rank + 2 * WIDTH * rank + 2 * LAYERS * WIDTH


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "targets", "expected"),
    [(True, None, 130_560), (False, None, 139_776), (True, "all_linear", 159_744)],
)
def test_parameter_count_of_blip_base(share, targets, expected):
    base = OmegaConf.load(BlipVqaAurora.default_config_path("base")).model
    own = {"pretrained": None, "share_decoder": share, "tokenizer": vqa_config().tokenizer}
    own["mode_approx"] = {"targets": targets}
    model = BlipVqaAurora.from_config(OmegaConf.merge(base, own))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_full_tuning_trains_all_and_frozen_nothing():
    assert all(p.requires_grad for p in vqa_model(tuning="full").parameters())
    assert not any(p.requires_grad for p in vqa_model(tuning="frozen").parameters())
    with pytest.raises(
        AuroraError, match="model.tuning: blip_vqa_aurora has no heads.*aurora, lora, uniadapter, full or frozen"
    ):
        vqa_model(tuning="heads")


# Shared slots (paper D.2)


def linears(model: nn.Module) -> dict[str, ModeApproxLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ModeApproxLinear)}


def test_decoder_uses_the_encoders_slots_layer_by_layer():
    model = vqa_model()
    found = linears(model)
    assert len(found) == LAYERS * (1 + 6 + 6)
    for layer in range(LAYERS):
        for part in ("attention", "crossattention"):
            for kind in ("query", "key", "value"):
                end = f"encoder.layer.{layer}.{part}.self.{kind}"
                ours, theirs = found[f"text_decoder.bert.{end}"], found[f"text_encoder.{end}"]
                assert ours.slots == theirs.slots == (model.mode_approx.slot_index(f"text_encoder.{end}"),)
    assert not [slot for slot in model.mode_approx.slots if slot.startswith("text_decoder")]
    assert not [name for name, _ in model.named_parameters() if "gate" in name and name.startswith("text_decoder")]


@pytest.mark.parametrize("end", ["crossattention.output.dense", "intermediate.dense", "output.dense"])
def test_with_all_linear_layers_the_decoder_shares_every_slot(end):
    model = vqa_model(mode_approx={"rank": 4, "targets": "all_linear"})
    found = linears(model)
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}.{end}"
        ours, theirs = found[f"text_decoder.bert.{name}"], found[f"text_encoder.{name}"]
        blocks = (
            [f"text_encoder.{name}.block{i}" for i in range(4)]
            if "attention" not in end
            else [f"text_encoder.{name}"]
        )
        assert ours.slots == theirs.slots == tuple(map(model.mode_approx.slot_index, blocks))
    assert not [slot for slot in model.mode_approx.slots if slot.startswith("text_decoder")]


def test_changing_a_slot_changes_both_towers():
    model = activate(vqa_model())
    end = "encoder.layer.1.crossattention.self.key"
    pair = [linears(model)[f"text_encoder.{end}"], linears(model)[f"text_decoder.bert.{end}"]]
    before = [linear.delta_weight().clone() for linear in pair]
    with torch.no_grad():
        model.mode_approx.sets["default"].P[model.mode_approx.slot_index(f"text_encoder.{end}")] *= 2
    for linear, old in zip(pair, before):
        torch.testing.assert_close(linear.delta_weight(), 2 * old)


@pytest.mark.parametrize(("share", "targets"), [(True, None), (False, None), (True, "all_linear")])
def test_one_gradient_from_both_towers(share, targets):
    """The gradient of the shared rows is the encoder's plus the decoder's."""
    model = activate(vqa_model(share_decoder=share, mode_approx={"targets": targets}), std=0.1).eval()
    factors = model.mode_approx.sets["default"]
    samples = vqa_batch()
    [whole] = torch.autograd.grad(model(samples).loss, factors.P)
    encoded, _ = model.forward_encoder(samples)
    states = encoded.last_hidden_state
    cut = states.detach().requires_grad_()
    loss = model.forward_decoder(samples, type(encoded)(last_hidden_state=cut))[0]
    by_decoder, to_states = torch.autograd.grad(loss, (factors.P, cut))
    [by_encoder] = torch.autograd.grad(states, factors.P, to_states)
    torch.testing.assert_close(whole, by_encoder + by_decoder, atol=1e-5, rtol=1e-3)
    rows = [model.mode_approx.slot_index(slot) for slot in model.mode_approx.slots if slot.startswith("text_encoder")]
    assert (by_encoder[rows].abs().sum(dim=1) > 0).all()
    assert (by_decoder[rows].abs().sum(dim=1) > 0).all() == share


def test_samples_are_left_as_they_were():
    model, samples = vqa_model().eval(), vqa_batch()
    model(samples)
    model.predict_answers({**samples, "text_input": QUESTIONS[0], "image": samples["image"][:1]}, **RANK)
    model.predict_answers(samples, **GREEDY)
    assert set(samples) == set(vqa_batch()) and samples["text_input"] == QUESTIONS


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": []}, "0 answers, n_answers [1, 2, 1, 2]"),
        ({"answer": None}, "training needs at least one answer"),
        ({"n_answers": None}, "6 answers, n_answers None"),
        ({"n_answers": torch.tensor([1, 1, 1, 1])}, "6 answers, n_answers [1, 1, 1, 1]"),
        ({"answer": [*ANSWERS[:5], "a " * 70]}, "has 72 tokens"),
        ({"text_input": ["why", "", "a", "b"]}, "question 1 of the batch is ''"),
    ],
)
def test_samples_that_cannot_be_trained_on(change, message):
    with pytest.raises(AuroraError) as caught:
        vqa_model()({**vqa_batch(), **change})
    assert message in str(caught.value)


def test_samples_that_lack_keys_name_them():
    samples = vqa_batch()
    with pytest.raises(AuroraError) as caught:
        vqa_model()({"text_input": samples["text_input"], "answer": ANSWERS[:6]})
    assert str(caught.value) == (
        "samples lack 'image', 'n_answers', 'weight'; training needs image (or video), text_input, answer, "
        "n_answers, weight; to answer questions use model.predict_answers"
    )
    with pytest.raises(AuroraError, match="0 questions for 4 images"):
        vqa_model().predict_answers({"image": samples["image"]}, answer_list=ANSWERS)


# Weights


def checkpoint(path, drop: tuple[str, ...] = (), **extra) -> str:
    """A BLIP pretraining checkpoint: without adapter, with parts that question answering does not need."""
    state = vqa_model(seed=3, tuning="frozen").state_dict()
    state = {key: value for key, value in state.items() if not key.startswith(drop)}
    extra = {"vision_proj.weight": torch.ones(2, 2), "text_encoder_m.x": torch.ones(2), **extra}
    torch.save({"model": {**state, **extra}}, path)
    return str(path)


@pytest.mark.parametrize("tuning", ["aurora", "full", "frozen"])
def test_pretraining_checkpoint_with_its_decoder_loads(tmp_path, tuning):
    model = vqa_model(pretrained=checkpoint(tmp_path / "x.pth"), tuning=tuning)
    expected = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    own = BlipVqaAurora.from_config(vqa_config(pretrained=str(tmp_path / "x.pth"), tuning=tuning)).state_dict()
    assert all(torch.equal(own[key], expected[key]) for key in own.keys() & expected.keys())
    assert {key for key in own.keys() - expected.keys() if "mode_approx" not in key and "gate" not in key} == set()
    assert model.tuning == tuning


def test_checkpoint_without_a_decoder_needs_full_tuning(tmp_path, caplog):
    path = checkpoint(tmp_path / "x.pth", drop=("text_decoder.",))
    for tuning in ("aurora", "frozen"):
        with pytest.raises(AuroraError, match=f"{path} has no answer decoder .* set model.tuning: full"):
            BlipVqaAurora.from_config(vqa_config(pretrained=path, tuning=tuning))
    model = BlipVqaAurora.from_config(vqa_config(pretrained=path, tuning="full"))
    assert "it starts as the text encoder" in caplog.text
    decoder = model.text_decoder.bert.state_dict()
    assert all(torch.equal(decoder[key], value) for key, value in model.text_encoder.state_dict().items())
    assert torch.equal(
        model.text_decoder.cls.predictions.decoder.weight, decoder["embeddings.word_embeddings.weight"]
    )


def test_incomplete_or_foreign_decoder_is_refused(tmp_path):
    part = "text_decoder.cls.predictions.transform"
    with pytest.raises(AuroraError, match=f"lacks 4 weights of the model: {part}"):
        vqa_model(pretrained=checkpoint(tmp_path / "x.pth", drop=(part,)), tuning="full")
    path = checkpoint(tmp_path / "y.pth", **{"text_decoder.bert.pooler.weight": torch.ones(2)})
    with pytest.raises(AuroraError, match="no place for: text_decoder.bert.pooler.weight"):
        vqa_model(pretrained=path)


def test_loads_by_name_with_processors():
    model, vis, txt = load_model_and_preprocess("blip_vqa_aurora", "tiny", is_eval=True)
    assert not model.training and set(vis) == set(txt) == {"train", "eval"}
    assert txt["eval"]("What is This?") == "what is this?"


# Videos


def as_video(samples: dict, frames: int = 1) -> dict:
    """The same samples with the picture as a video of so many equal frames."""
    rest = {key: value for key, value in samples.items() if key != "image"}
    return {**rest, "video": samples["image"].unsqueeze(2).expand(-1, -1, frames, -1, -1)}


@torch.no_grad()
def test_a_video_of_one_frame_is_a_picture():
    model = activate(vqa_model()).eval()
    samples = vqa_batch()
    assert torch.equal(model(as_video(samples)).loss, model(samples).loss)
    for method in (GREEDY, BEAMS, RANK):
        assert model.predict_answers(as_video(samples), **method) == model.predict_answers(samples, **method)


@torch.no_grad()
def test_questions_see_the_tokens_of_all_frames():
    """Against LAVIS's question encoder over the frames' tokens, one after the other."""
    model = vqa_model().eval()
    samples = vqa_batch()
    video = torch.randn(4, 3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    output, tokens = model.forward_encoder({"image": video, "text_input": samples["text_input"]})
    frames = [model.visual_encoder.forward_features(video[:, :, t]) for t in range(3)]
    torch.testing.assert_close(tokens, torch.cat(frames, dim=1), atol=1e-5, rtol=1e-5)
    twin = lavis_twin(model)

    class Frames(nn.Module):
        def forward_features(self, _image):
            return torch.cat(frames, dim=1)

    twin.visual_encoder = Frames()
    theirs = twin.forward_encoder({**samples, "text_input": list(samples["text_input"])})[0]
    torch.testing.assert_close(output.last_hidden_state, theirs.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert model.predict_answers({"video": video, "text_input": samples["text_input"]}, **GREEDY) == (
        twin.predict_answers({**samples, "text_input": list(samples["text_input"])}, **GREEDY)
    )


def test_each_video_needs_its_question():
    samples = as_video(vqa_batch(), frames=2)
    with pytest.raises(AuroraError, match="3 questions for 4 videos"):
        vqa_model().predict_answers({**samples, "text_input": samples["text_input"][:3]}, **GREEDY)
