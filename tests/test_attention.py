import torch

from lavis_aurora.attention import Packing, merge_heads, split_heads


def test_heads_split_and_merge():
    x = torch.randn(2, 3, 8)
    assert split_heads(x, 4).shape == (2, 4, 3, 2)
    assert torch.equal(split_heads(x, 4)[1, 2, 0], x[1, 0, 4:6])
    assert torch.equal(merge_heads(split_heads(x, 4)), x)


def test_packed_texts_are_padded_in_groups_and_packed_again():
    lengths = torch.tensor([1, 1, 2, 3, 4, 9, 10, 35])
    texts = [torch.randn(int(n), 5) for n in lengths]
    packed = torch.cat(texts).unsqueeze(0)
    packing = Packing(lengths, packed.device)
    assert torch.equal(packed[0, packing.first], torch.stack([text[0] for text in texts]))
    groups = list(packing.padded(packed, 2 * packed))
    assert sum(keep.sum() for keep, *_ in groups) == lengths.sum()
    assert 1 < len(groups) < len(texts)
    rest = iter(texts)
    for keep, one, double in groups:
        longest = keep.shape[1]
        assert keep.sum(dim=1).max() == longest and keep.sum(dim=1).min() > 0.7 * longest
        assert torch.equal(double, 2 * one)
        for row, padded in zip(keep, one):
            text = next(rest)
            assert torch.equal(row, torch.arange(longest) < len(text))
            assert torch.equal(padded[row], text)
    assert torch.equal(packing.packed(one for _, one, _ in groups), packed)


def test_one_text_is_its_own_packing():
    packed = torch.randn(1, 3, 2)
    packing = Packing(torch.tensor([3]), packed.device)
    [(keep, padded)] = packing.padded(packed)
    assert keep.all() and torch.equal(padded, packed) and torch.equal(packing.packed([padded]), packed)
