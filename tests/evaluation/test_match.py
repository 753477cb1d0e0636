"""Any pictures with any texts: LAVIS's own matching model, and plain loops, give the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lavis.models.blip_models.blip_image_text_matching import BlipITM
from tiny import activate, lavis_towers, tiny_config, tiny_model
from tiny_retrieval import distinct_model, plain_scores

from lavis_aurora import AuroraError, disable_adapter
from lavis_aurora.encoders.towers import build_tokenizer
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora

TEXTS = ["a red circle", "a big blue square above a small star and " + "a ring " * 30, "a ring", "a small pink heart"]
SAME = {"rtol": 0, "atol": 1e-5}


def _images(count: int = 3, frames: int = 0) -> torch.Tensor:
    shape = (count, 3, frames, 48, 48) if frames else (count, 3, 48, 48)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _lavis_itm(model: BlipRetrievalAurora) -> BlipITM:
    """LAVIS's own model and towers with the backbone and heads of ``model``."""
    cfg = tiny_config()

    class Plain(BlipITM):
        @classmethod
        def init_tokenizer(cls):
            return build_tokenizer(cfg.tokenizer)

    twin = Plain(*lavis_towers(cfg), embed_dim=cfg.embed_dim)
    state = model.state_dict()
    twin.load_state_dict({key: state[key] for key in twin.state_dict()}, strict=True)
    return twin.eval()


@pytest.mark.parametrize("gate", ["residual", "none"])
@torch.no_grad()
def test_at_step_0_scores_are_those_of_lavis_matching_model(gate: str) -> None:
    model, images = distinct_model(gate={"form": gate}), _images()
    twin, scores = _lavis_itm(model), model.match(images, TEXTS)
    assert scores.itc.shape == scores.itm.shape == (3, 4)
    samples = {"image": images, "text_input": TEXTS}
    torch.testing.assert_close(scores.itc, twin(samples, match_head="itc"), **SAME)
    for j, text in enumerate(TEXTS):
        theirs = twin({"image": images, "text_input": [text] * 3}, match_head="itm")
        torch.testing.assert_close(scores.itm_logits[:, j], theirs, **SAME)
        torch.testing.assert_close(scores.itm[:, j], F.softmax(theirs, dim=1)[:, 1], **SAME)
    assert scores.itm.std() > 1e-3 and scores.itc.std() > 1e-3
    assert f" itm={scores.itm}, " in repr(scores)


@pytest.mark.parametrize("frames", [0, 2])
def test_a_tuned_model_is_in_force_gate_and_all(frames: int) -> None:
    model, images = activate(distinct_model(), std=0.25).eval(), _images(2, frames)
    scores = model.match(images, TEXTS)
    for i, image in enumerate(images):
        for j, text in enumerate(TEXTS):
            itc, logits = plain_scores(model, image, text)
            torch.testing.assert_close(scores.itc[i, j], itc, **SAME)
            torch.testing.assert_close(scores.itm_logits[i, j], logits, rtol=0, atol=1e-4)
    with disable_adapter(model):
        assert (model.match(images, TEXTS).itm_logits - scores.itm_logits).abs().max() > 0.01
    gates = [layer.crossattention.gate for layer in model.text_encoder.encoder.layer]
    with torch.no_grad():
        for gate in gates:
            gate.gamma.zero_(), gate.beta.zero_()
    assert (model.match(images, TEXTS).itm_logits - scores.itm_logits).abs().max() > 0.01


def test_a_model_in_training_is_left_as_it_was() -> None:
    """Dropout is off for the scores, and on again where it was; no gradient, no random number."""
    model = activate(distinct_model(mode_approx={"dropout": 0.5})).train()
    model.visual_encoder.eval()
    before, state = [m.training for m in model.modules()], torch.get_rng_state()
    scores = model.match(_images(), TEXTS)
    assert [m.training for m in model.modules()] == before and model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not scores.itm_logits.requires_grad and not scores.itc.requires_grad
    assert torch.equal(scores.itm_logits, model.eval().match(_images(), TEXTS).itm_logits)


def test_one_text_is_a_list_of_it_and_more_pairs_change_nothing() -> None:
    model, images = activate(distinct_model()), _images(20)
    both = model.match(images, TEXTS)
    alone = model.match(images[17:18], TEXTS[1])
    assert alone.itc.shape == (1, 1) and alone.itm_logits.shape == (1, 1, 2)
    torch.testing.assert_close(alone.itc, both.itc[17:18, 1:2], **SAME)
    torch.testing.assert_close(alone.itm_logits, both.itm_logits[17:18, 1:2], **SAME)


def test_a_model_in_half_precision_takes_the_same_pictures() -> None:
    model, images = distinct_model(), _images()
    expected = model.match(images, TEXTS)
    scores = model.to(torch.bfloat16).match(images, TEXTS)
    assert scores.itm.dtype == scores.itc.dtype == torch.float32
    torch.testing.assert_close(scores.itm, expected.itm, rtol=0, atol=0.05)


def test_it_says_nothing_of_work_that_takes_no_time(capsys: pytest.CaptureFixture) -> None:
    distinct_model().match(_images(), TEXTS)
    printed = capsys.readouterr()
    assert "encoding" not in printed.err + printed.out and "reranking" not in printed.err + printed.out


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (_images(), [], "texts: there is none"),
        (_images(), ["a ring", " "], "texts: text 1 is ' '; it must have words"),
        (_images(), ["a ring", 3], "texts: text 1 is 3"),
        (_images(), None, "texts: NoneType cannot be used; it must be a text or a list of texts"),
        (_images(0), TEXTS, "images: there is none in shape (0, 3, 48, 48)"),
        (_images(2, 1)[:, :, :0], TEXTS, "images: there is none in shape (2, 3, 0, 48, 48)"),
        (_images()[0], TEXTS, "images: shape (3, 48, 48) cannot be used; it must be (pictures, 3, 48, 48)"),
        (torch.zeros(2, 3, 64, 48), TEXTS, "images: shape (2, 3, 64, 48)"),
        (torch.zeros(2, 4, 3, 48, 48), TEXTS, "or (videos, 3, frames, 48, 48)"),
        (
            _images().to(torch.uint8),
            TEXTS,
            "images: torch.uint8 cannot be used; the eval processor makes (3, 48, 48)",
        ),
        (list(_images()), TEXTS, "images: list cannot be used"),
    ],
)
def test_what_cannot_be_scored_is_one_clear_error(images: object, texts: object, message: str) -> None:
    with pytest.raises(AuroraError) as caught:
        tiny_model().match(images, texts)
    assert message in str(caught.value)
