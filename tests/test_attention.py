import pytest
import torch

from lavis_aurora.attention import attend, merge_heads, split_heads

HEADS, LENGTH, KEYS, WIDTH = 2, 3, 5, 4


def plain(query, key, value, mask=None):
    """Attention written out."""
    scores = query @ key.transpose(-1, -2) / WIDTH**0.5
    return torch.softmax(scores if mask is None else scores + mask, dim=-1) @ value


def random(batch: int, length: int) -> torch.Tensor:
    return torch.randn(batch, HEADS, length, WIDTH, dtype=torch.float64)


def test_one_key_set_a_query_with_a_mask():
    torch.manual_seed(0)
    query, key, value = random(6, LENGTH), random(6, KEYS), random(6, KEYS)
    mask = torch.zeros(6, 1, 1, KEYS, dtype=torch.float64)
    mask[2, ..., 3:] = -10000.0
    torch.testing.assert_close(attend(query, key, value, mask), plain(query, key, value, mask))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_shared_keys_equal_repeated_keys(groups):
    torch.manual_seed(0)
    query, key, value = random(6, LENGTH), random(groups, KEYS), random(groups, KEYS)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    repeats = 6 // groups
    shared = attend(query, key, value)
    repeated = plain(query, key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0))
    torch.testing.assert_close(shared, repeated)
    target = torch.randn_like(shared)
    for a, b in zip(
        torch.autograd.grad((shared * target).sum(), inputs), torch.autograd.grad((repeated * target).sum(), inputs)
    ):
        torch.testing.assert_close(a, b)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="6 queries cannot share 4 keys"):
        attend(random(6, LENGTH), random(4, KEYS), random(4, KEYS))
    with pytest.raises(ValueError, match="with a mask"):
        attend(random(6, LENGTH), random(2, KEYS), random(2, KEYS), torch.zeros(1))


def test_heads_split_and_merge():
    x = torch.randn(2, 3, 8)
    assert split_heads(x, 4).shape == (2, 4, 3, 2)
    assert torch.equal(split_heads(x, 4)[1, 2, 0], x[1, 0, 4:6])
    assert torch.equal(merge_heads(split_heads(x, 4)), x)
