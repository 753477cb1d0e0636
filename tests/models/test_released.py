"""The settings of the authors' released code, each a key: what they change, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny import activate, tiny_config, tiny_model
from tiny_retrieval import batch, train_steps
from tiny_vqa import vqa_batch, vqa_model

from lavis_aurora import AuroraError, disable_adapter, load_adapter, save_adapter
from lavis_aurora.adapters.companions import adapter_parameters
from lavis_aurora.alignment.context import enhance_context
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora

RELEASED = Path(__file__).resolve().parents[2] / "projects/aurora/released"
WIDTH, LAYERS, RANK = 128, 3, 4
METHOD = {"form": "core", "rank": RANK, "scale": 1.0, "targets": "released"}
RETRIEVAL = {
    "mode_approx": METHOD,
    "gate": {"form": "affine"},
    "context": {"form": "mean_right"},
    "alpha_epochs": 1,
    "teacher_factors": "student",
    "train_text_proj": False,
    "train_temp": False,
}
VQA = {"mode_approx": METHOD, "gate": {"form": "affine", "decoder": True}, "share_decoder": False}


def plain(model):
    """Logits of matching and similarities."""
    with torch.no_grad():
        scores = model.eval().match(batch()["image"], batch()["text_input"])
        return torch.cat([scores.itm_logits.flatten(), scores.itc.flatten()])


def trained(model, prefix: str = "") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and name.startswith(prefix))


def test_step_0_is_the_frozen_model():
    assert torch.equal(plain(tiny_model(**RETRIEVAL)), plain(tiny_model(tuning="frozen")))
    released, frozen = vqa_model(**VQA).eval(), vqa_model(tuning="frozen").eval()
    with torch.no_grad():
        assert torch.equal(released(vqa_batch())["loss"], frozen(vqa_batch())["loss"])


def test_as_many_parameters_as_the_rule_says():
    """2dR + R^3 + 18L R and the gate's 4Ld; 6L R and 4Ld more for the decoder."""
    count = sum(p.numel() for _, p in adapter_parameters(tiny_model(**RETRIEVAL)) if p.requires_grad)
    assert count == 2 * WIDTH * RANK + RANK**3 + 18 * LAYERS * RANK + 4 * LAYERS * WIDTH
    assert trained(vqa_model(**VQA)) == count + 6 * LAYERS * RANK + 4 * LAYERS * WIDTH


@pytest.mark.slow
@pytest.mark.parametrize(("project", "expected"), [("msrvtt_ret", 411_136), ("coco_ret", 125_696)])
def test_as_many_as_the_released_code_trains_on_blip_base(project, expected):
    base = OmegaConf.load(BlipRetrievalAurora.default_config_path("base")).model
    own = {"pretrained": None, "tokenizer": tiny_config().tokenizer, "queue_size": 0}
    config = OmegaConf.merge(base, OmegaConf.load(RELEASED / f"{project}.yaml").model, own)
    model = BlipRetrievalAurora.from_config(config)
    assert sum(p.numel() for _, p in adapter_parameters(model) if p.requires_grad) == expected
    # Besides vision_proj and itm_head.
    assert trained(model) == expected + 768 * 256 + 256 + 768 * 2 + 2


def test_projection_of_texts_and_temperature_stay():
    model = tiny_model(**RETRIEVAL)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train_steps(model)
    moved = {name.partition(".")[0] for name, p in model.named_parameters() if not torch.allclose(p, before[name])}
    assert moved == {"mode_approx", "text_encoder", "vision_proj", "vision_proj_m", "itm_head"}
    assert all(".gate." in n for n, p in model.named_parameters() if p.requires_grad and n.startswith("text_encoder"))


def test_the_teachers_projection_is_the_frozen_one_to_the_last_bit():
    model = tiny_model(**{**RETRIEVAL, "momentum": 0.9})
    train_steps(model)
    assert torch.equal(model.text_proj_m.weight, model.text_proj.weight)
    assert not torch.equal(model.vision_proj_m.weight, model.vision_proj.weight)


def test_the_teacher_has_the_students_factors_and_its_own_average_of_the_vectors():
    model = activate(tiny_model(**{**RETRIEVAL, "momentum": 0.75}))
    sets = model.mode_approx.sets
    expected = {}
    for name, average in sets["momentum"].named_parameters():
        own = sets["default"].get_parameter(name).detach().clone()
        expected[name] = 0.75 * average + 0.25 * own if name == "P" else own
    model(batch())
    found = dict(sets["momentum"].named_parameters())
    assert found.keys() >= {"core", "P"} and not any(p.requires_grad for p in found.values())
    torch.testing.assert_close(found, expected)
    assert torch.equal(found["core"], sets["default"].core) and found["core"] is not sets["default"].core


def test_alpha_rises_over_the_first_epoch():
    one, two = tiny_model(alpha_epochs=1), tiny_model()
    assert [one._rampup_factor(*at, 10) for at in ((0, 0), (0, 5), (1, 0), (3, 2))] == [0, 0.5, 1, 1]
    assert [two._rampup_factor(*at, 10) for at in ((0, 0), (0, 5), (1, 0), (3, 2))] == [0, 0.25, 0.5, 1]


def test_context_of_right_pairs_alone():
    f, t = torch.randn(6, 3), torch.randn(2, 3)
    found = enhance_context(f, t, "mean_right", right=2)
    torch.testing.assert_close(found[:2], f[:2] + 0.05 * (t[0] + t[1]))
    assert torch.equal(found[2:], f[2:])
    with pytest.raises(AuroraError, match="mean_right is for right pairs alone"):
        enhance_context(f, t, "mean_right")
    # The model says which they are: its first logits alone differ from those without.
    with_it, without = (tiny_model(context={"form": form}, queue_size=0) for form in ("mean_right", "none"))
    logits = []
    for model in (with_it, without):
        for module in model.train().modules():
            module.p = 0.0  # nothing dropped
        torch.manual_seed(0)
        logits.append(model(batch())["intermediate_output"].itm_logits.detach())
    same = torch.isclose(*logits, atol=1e-6).all(dim=1)
    assert not same[:5].any() and same[5:].all()


def test_the_decoder_has_gates_of_its_own():
    model = vqa_model(**VQA).eval()
    layer = model.text_decoder.bert.encoder.layer[-1]
    outputs = []
    layer.register_forward_hook(lambda _module, _args, output: outputs.append(output[0]))
    with torch.no_grad():
        model(vqa_batch())
        layer.gate.beta_t.fill_(0.3)
        layer.gate.gamma_f.fill_(0.0)
        model(vqa_batch())
        with disable_adapter(model):
            model(vqa_batch())
    torch.testing.assert_close(outputs[1], outputs[0] + 0.1 * 0.3)
    torch.testing.assert_close(outputs[2], outputs[0])


@torch.no_grad()
def test_generated_answers_are_those_without_a_cache():
    model = activate(vqa_model(**VQA), std=0.5).eval()
    samples = vqa_batch()
    states = model.forward_encoder(dict(samples))[0].last_hidden_state
    tokens = torch.full((len(states), 1), model.tokenizer.bos_token_id)
    for _ in range(5):
        logits = model.text_decoder(tokens, encoder_hidden_states=states, return_dict=True).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
    cached = model.text_decoder.generate(
        input_ids=tokens[:, :1], encoder_hidden_states=states, max_length=6, min_length=6, num_beams=1
    )
    assert torch.equal(cached, tokens)


def test_an_adapter_brings_its_settings(tmp_path):
    model = activate(vqa_model(**VQA)).eval()
    save_adapter(model, tmp_path)
    fresh = vqa_model(**VQA).eval()
    load_adapter(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh(vqa_batch())["loss"], model(vqa_batch())["loss"])
    with pytest.raises(AuroraError, match="gate"):
        load_adapter(vqa_model(**{**VQA, "gate": {"form": "affine"}}), tmp_path)


@pytest.mark.parametrize(
    ("build", "overrides", "words"),
    [
        (vqa_model, {"gate": {"form": "residual", "decoder": True}}, "gate.decoder: not with gate.form: residual"),
        (tiny_model, {"gate": {"form": "affine", "decoder": True}}, "model.gate.decoder: the model has no answer"),
        (tiny_model, {"teacher_factors": "own"}, "model.teacher_factors.*'own'"),
        (tiny_model, {"teacher_factors": "student", "tuning": "heads"}, "model.teacher_factors: student is for"),
        (tiny_model, {"alpha_epochs": 0}, "model.alpha_epochs.*above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(build, overrides, words):
    with pytest.raises(AuroraError, match=words):
        build(**overrides)
