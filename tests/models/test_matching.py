import torch

from lavis_aurora.models import matching
from lavis_aurora.models.matching import sample_hard_negatives


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_negatives_are_drawn_by_their_probability():
    logits = torch.tensor([[5.0, 1.0, 0.0, 2.0]])
    same = torch.tensor([[True, False, False, False]])
    expected = torch.softmax(logits[0, 1:], dim=0)
    draws = torch.stack([sample_hard_negatives(logits, same, generator(seed))[0] for seed in range(4000)])
    shares = torch.bincount(draws[:, 0], minlength=4) / len(draws)
    assert shares[0] == 0
    assert (shares[1:] - expected).abs().max() < 0.03


def test_underflowing_probabilities_still_give_a_true_negative():
    logits = torch.tensor([[5000.0, -5000.0], [0.0, 0.0]])
    column, found = sample_hard_negatives(logits, torch.eye(2, dtype=torch.bool), generator(0))
    assert column.tolist() == [1, 0]
    assert found.all()


def test_a_row_without_negatives_says_so():
    same = torch.tensor([[True, True], [False, True]])
    column, found = sample_hard_negatives(torch.zeros(2, 2), same, generator(0))
    assert found.tolist() == [False, True]
    assert column[1] == 0


def test_two_processes_draw_what_one_draws(monkeypatch):
    logits, same = torch.randn(6, 6), torch.eye(6, dtype=torch.bool)
    whole, _ = sample_hard_negatives(logits, same, generator(7))
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(matching, "get_rank", lambda rank=rank: rank)
        rows = slice(rank, None, 2)
        parts.append(sample_hard_negatives(logits[rows], same[rows], generator(7))[0])
    assert torch.equal(torch.stack(parts, dim=1).flatten(), whole)
