"""What scores and answers draws no dropout, whatever the model's mode, and leaves each module in its mode."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import activate, tiny_model
from tiny_vqa import ANSWERS, vqa_batch, vqa_model
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lavis_aurora import AuroraError, ModeApproxConfig, disable_adapter
from lavis_aurora.models.mode_approx_model import ModeApproxModel


class Split(Dataset):
    """Three pictures with a text each, as LAVIS's RetrievalEvalDataset."""

    text = ["a red circle", "a blue star above a small ring", "a pink heart"]
    pixels = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.pixels[index], "index": index}


def matrix(model) -> np.ndarray:
    return np.concatenate(model.compute_sim_matrix(DataLoader(Split()), {"k_test": 3}))


def similarities(model) -> np.ndarray:
    return model.retrieval_scores(DataLoader(Split()), {"k_test": 2}).matrix("text_to_image")


def match(model) -> np.ndarray:
    return model.match(Split.pixels, Split.text).itm_logits.numpy()


def answers(**how: Any) -> Callable:
    return lambda model: model.predict_answers(vqa_batch(), **how)


def retrieval():
    return activate(tiny_model(mode_approx={"dropout": 0.5}))


def questions():
    return activate(vqa_model(mode_approx={"dropout": 0.5}))


class Dropping(nn.Module):
    """The methods by which LAVIS's tasks evaluate its models."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def predict(self, samples: dict[str, Any]) -> np.ndarray:
        return self.dropout(self.query(torch.ones(8, 4))).detach().numpy()

    generate = predict_answers = predict

    def compute_sim_matrix(self, data_loader: DataLoader, task_cfg: dict) -> tuple[np.ndarray, np.ndarray]:
        return self.predict({}), self.predict({})


def around():
    return ModeApproxModel(Dropping(), ModeApproxConfig(rank=2))


@pytest.mark.parametrize(
    ("build", "score"),
    [
        (retrieval, match),
        (retrieval, matrix),
        (retrieval, similarities),
        (questions, answers(answer_list=ANSWERS)),
        (questions, answers(inference_method="generate", num_beams=1)),
        (questions, answers(inference_method="generate", num_beams=3)),
        (around, matrix),
        (around, lambda model: model.predict({})),
        (around, lambda model: model.generate({})),
        (around, lambda model: model.predict_answers({})),
    ],
)
def test_a_model_in_training_scores_as_in_eval_mode_and_stays_in_training(build, score):
    model = build().train()
    *_, part = model.modules()
    part.eval()  # as a user who keeps one part still
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    scores = score(model)
    assert [module.training for module in model.modules()] == modes and model.training
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(scores, score(model.eval()))
    assert not model.training


def test_an_error_leaves_the_modes_as_they_were():
    model = questions().train()
    with torch.no_grad():
        model.text_encoder.embeddings.word_embeddings.weight.fill_(torch.nan)
    with pytest.raises(AuroraError, match="scores of answers are NaN"):
        model.predict_answers(vqa_batch(), answer_list=ANSWERS)
    assert all(module.training for module in model.modules())


def test_a_head_that_was_scored_while_disabled_goes_on_training():
    base = Dropping()
    base.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = ModeApproxModel(base, ModeApproxConfig(rank=2, targets=["query"]), ["head"]).train()
    with disable_adapter(model):
        model.predict({})
        assert not model.head[1].training
    model.predict({})
    assert model.head[1].training
