"""Shared keys and values against attention written out over repeated ones."""

import pytest
import torch
from tiny_retrieval import saved_for_backward

from lavis_aurora.encoders.fused import attend_in_matching

BATCH, HEADS, LENGTH, KEYS, WIDTH = 4, 2, 3, 5, 4


def random(rows: int, length: int) -> torch.Tensor:
    return torch.randn(rows, HEADS, length, WIDTH, dtype=torch.float64, requires_grad=True)


def plain(query, key, value, index):
    scores = query @ key[index].transpose(-1, -2) / WIDTH**0.5
    return torch.softmax(scores, dim=-1) @ value[index]


@pytest.mark.parametrize("wrong", [[1, 1, 0, 2], None])
def test_three_passes_equal_repeated_keys(wrong):
    torch.manual_seed(0)
    images = BATCH if wrong else 2 * BATCH
    inputs = random(3 * BATCH, LENGTH), random(images, KEYS), random(images, KEYS)
    own = list(range(BATCH))
    index = [*own, *(wrong or range(BATCH, 2 * BATCH)), *own]
    shared = attend_in_matching(*inputs, None if wrong is None else torch.tensor(wrong))
    repeated = plain(*inputs, index)
    torch.testing.assert_close(shared, repeated)
    target = torch.randn_like(shared)
    for a, b in zip(*(torch.autograd.grad((y * target).sum(), inputs) for y in (shared, repeated))):
        torch.testing.assert_close(a, b)


def test_copies_of_keys_are_not_kept_for_the_backward_pass():
    query, key, value = random(3 * BATCH, LENGTH), random(BATCH, KEYS), random(BATCH, KEYS)
    with saved_for_backward() as kept:
        attend_in_matching(query, key, value, torch.tensor([1, 0, 3, 2]))
    sources = {x.untyped_storage().data_ptr() for x in kept if x.shape[-2:] == (KEYS, WIDTH)}
    assert sources == {key.untyped_storage().data_ptr(), value.untyped_storage().data_ptr()}


def test_with_dropout_one_copy_of_keys_and_values_is_kept():
    """Of one product of keys and values, heads last, as the layers give them: not the product beside the copies."""
    product = torch.randn(BATCH, KEYS, 2 * HEADS * WIDTH, requires_grad=True)
    key, value = (x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for x in product.chunk(2, dim=-1))
    with saved_for_backward() as kept:
        attend_in_matching(random(3 * BATCH, LENGTH).float(), key, value, torch.tensor([1, 0, 3, 2]), dropout=0.1)
    assert product.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in kept}
