import torch

from lavis_aurora.encoders.fused import Packing, merge_heads, split_heads


def test_heads_split_and_merge():
    x = torch.randn(2, 3, 8)
    assert split_heads(x, 4).shape == (2, 4, 3, 2)
    assert torch.equal(split_heads(x, 4)[1, 2, 0], x[1, 0, 4:6])
    assert torch.equal(merge_heads(split_heads(x, 4)), x)


def test_packed_texts_are_batches_of_one_length_and_packed_again():
    lengths = torch.tensor([1, 1, 2, 3, 3, 3, 35])
    texts = [torch.randn(int(n), 5) for n in lengths]
    packed = torch.cat(texts).unsqueeze(0)
    packing = Packing(lengths, packed.device)
    assert torch.equal(packed[0, packing.first], torch.stack([text[0] for text in texts]))
    groups = list(packing.unpacked(packed, 2 * packed))
    assert [tuple(one.shape) for one, _ in groups] == [(2, 1, 5), (1, 2, 5), (3, 3, 5), (1, 35, 5)]
    rest = iter(texts)
    for one, double in groups:
        assert torch.equal(double, 2 * one)
        assert all(torch.equal(text, next(rest)) for text in one)
        # Nothing was copied.
        assert one.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    assert torch.equal(packing.packed(one for one, _ in groups), packed)
