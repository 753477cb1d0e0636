"""How the tiny model learned to answer questions, and that the weights which come with the package do."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import pretrain_tiny_vqa
import pytest
import torch
from make_tiny_weights import stored_weights
from safetensors.torch import load_file
from tiny_vqa import vqa_model

from lavis_aurora.demo.questions import KINDS, SHAPE_COUNTS, askable, iter_questions
from lavis_aurora.demo.scenes import iter_scenes
from lavis_aurora.models.loading import load_model_and_preprocess

SCENES = list(islice(iter_scenes("clean", "train", 0, SHAPE_COUNTS), 40))


def test_questions_drawn_are_those_that_the_picture_answers_and_yes_is_right_as_often_as_no() -> None:
    rng = random.Random(0)
    kinds: Counter[str] = Counter()
    answers = defaultdict(Counter)
    for scene in SCENES:
        by_kind = askable(scene, "clean")
        known = {q.text: q for wordings in by_kind.values() for questions in wordings for q in questions}
        drawn = pretrain_tiny_vqa.draw(pretrain_tiny_vqa.asked_about(scene), 100, pretrain_tiny_vqa.SHARES, rng)
        for text, answer in drawn:
            if text.startswith("say "):
                assert text == f"say {answer}"
                kinds["word"] += 1
                continue
            assert known[text].answer == answer
            kinds[known[text].kind] += 1
            answers[known[text].template][answer] += 1
    for template, counts in answers.items():
        if {*counts} == {"yes", "no"}:
            assert 0.4 < counts["yes"] / sum(counts.values()) < 0.6, template
    total = sum(pretrain_tiny_vqa.SHARES.values())
    for kind in (*KINDS, "word"):
        assert kinds[kind] / sum(kinds.values()) == pytest.approx(pretrain_tiny_vqa.SHARES[kind] / total, abs=0.05)


def test_yes_no_and_positions_are_asked_for_alone_at_first() -> None:
    asked, known = pretrain_tiny_vqa.asked_about(SCENES[0]), askable(SCENES[0], "clean")
    drawn = pretrain_tiny_vqa.draw(asked, 50, pretrain_tiny_vqa.FIRST, random.Random(0))
    kind_of = {one.text: kind for kind, wordings in known.items() for questions in wordings for one in questions}
    assert {kind_of[text] for text, _ in drawn} == {"yes/no", "position"}


def test_loss_is_the_models_own() -> None:
    """Of pictures encoded once, for two questions each."""
    model = vqa_model(tuning="full").eval()
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    asked = [("what color is it?", "red"), ("is there a star?", "no"), ("how many?", "2"), ("where?", "top left")]
    visual = model.visual_encoder(images).repeat_interleave(2, dim=0)
    samples = {
        "image": images.repeat_interleave(2, dim=0),
        "text_input": [text for text, _ in asked],
        "answer": [answer for _, answer in asked],
        "n_answers": torch.ones(4, dtype=torch.long),
        "weight": torch.ones(4),
    }
    assert torch.allclose(pretrain_tiny_vqa.loss_of(model, visual, asked), model(samples).loss, rtol=1e-5)


@pytest.mark.parametrize("fall", [0.2, 0.5])
def test_rate_rises_stays_and_falls_to_the_end(fall: float) -> None:
    shares = [pretrain_tiny_vqa.share_of_rate(step, 1000, fall) for step in range(1000)]
    top = round(1000 * (1 - fall))
    assert shares[:100] == pytest.approx([(step + 1) / 100 for step in range(100)])
    assert {*shares[100 : top + 1]} == {1.0}
    assert shares[top:] == pytest.approx([(1000 - step) / (1000 - top) for step in range(top, 1000)])


class Knowing:
    """A model that gives these answers in turn."""

    def __init__(self, answers: list[str]) -> None:
        self.answers = iter(answers)

    def predict_answers(self, samples: dict, answer_list: list[str]) -> list[str]:
        assert len(samples["image"]) == len(samples["text_input"])
        return [next(self.answers) for _ in samples["text_input"]]


def test_right_answers_are_counted_by_kind() -> None:
    truths = [question for _, question, _ in islice(iter_questions("clean", "val", 0, 4), 160)]
    images = torch.zeros(40, 3, 2, 2)
    right = pretrain_tiny_vqa.right_answers(Knowing([q.answer for q in truths]), images, "val", each=4)
    assert right == dict.fromkeys(KINDS, 100.0)
    always = pretrain_tiny_vqa.right_answers(Knowing(["yes"] * 160), images, "val", each=4)
    assert {kind: always[kind] for kind in KINDS if kind != "yes/no"} == dict.fromkeys(KINDS[:-1], 0.0)
    assert always["yes/no"] == pytest.approx(50, abs=4)


def _run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--steps", "4", "--batch", "4", "--pictures", "12", "--test", "6", "--validate-every", "2"]
    monkeypatch.setattr("sys.argv", ["pretrain_tiny_vqa.py", *arguments, "--output", str(path)])
    pretrain_tiny_vqa.main()


@pytest.mark.slow
def test_it_writes_the_same_weights_again_and_replaces_none_by_worse(tmp_path, monkeypatch, capsys, caplog) -> None:
    first, again = tmp_path / "new" / "first.safetensors", tmp_path / "again.safetensors"
    _run(first, monkeypatch)
    assert "right answers on test, percent: color" in capsys.readouterr().out
    again.write_bytes(b"better ones")
    with pytest.raises(SystemExit, match=r"^error: below --least 85: color "):
        _run(again, monkeypatch)
    assert again.read_bytes() == b"better ones"
    assert first.read_bytes() == (tmp_path / "untested_again.safetensors").read_bytes()
    assert f"{again} is not replaced; the new weights are in " in caplog.text
    assert [*first.parent.iterdir()] == [first]
    written, start = load_file(first), load_file(pretrain_tiny_vqa.START)
    shipped = load_file(pretrain_tiny_vqa.TARGET)
    assert {key: value.shape for key, value in written.items()} == {k: value.shape for k, value in shipped.items()}
    vision = [key for key in written if key.startswith("visual_encoder")]
    assert vision and all(torch.equal(written[key], start[key]) for key in vision)
    moved = [key for key in written if key in start and not torch.equal(written[key], start[key])]
    assert any(key.startswith("text_encoder") for key in moved)


def test_shipped_weights_hold_what_this_program_writes() -> None:
    shipped, kept = load_file(pretrain_tiny_vqa.TARGET), stored_weights(vqa_model(tuning="full"))
    assert {key: value.shape for key, value in shipped.items()} == {key: value.shape for key, value in kept.items()}
    assert {value.dtype for value in shipped.values()} == {torch.float16}


@pytest.mark.parametrize("pictures", [12, pytest.param(75, marks=pytest.mark.slow)])
def test_shipped_weights_answer_questions_of_each_kind(pictures: int) -> None:
    model, vision, _ = load_model_and_preprocess("blip_vqa_aurora", "tiny", is_eval=True)
    _, images = pretrain_tiny_vqa.pictures_of("test", pictures, vision["eval"])
    right = pretrain_tiny_vqa.right_answers(model, images, "test", each=4)
    assert min(right.values()) > 85, right
    assert pretrain_tiny_vqa.words_said(model, images[0]) == 100
