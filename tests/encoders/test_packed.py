"""Texts with one image without padding, against LAVIS's own forward of one text at a time."""

from __future__ import annotations

import pytest
import torch
from tiny import activate, tiny_model

from lavis_aurora.encoders.fusion import encode_with_image
from lavis_aurora.encoders.towers import compile_layers

LENGTHS = torch.tensor([1, 4, 4, 5, 13, 35])


@pytest.mark.parametrize(
    "changes",
    [
        {"tuning": "frozen"},
        {"gate": {"form": "none"}},
        {"gate": {"form": "residual"}},
        {"gate": {"form": "convex"}},
        {"gate": {"form": "affine"}},
    ],
    ids=lambda changes: "_".join(str(v) for v in changes.values()),
)
def test_first_positions_equal_those_of_single_texts(changes):
    encoder = activate(tiny_model(**changes)).eval().text_encoder
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 400, (len(LENGTHS), 35), generator=generator)
    image = torch.randn(10, 128, generator=generator)
    with torch.no_grad():
        ours = encode_with_image(encoder, ids, LENGTHS, image)
        for row, length, first in zip(ids, LENGTHS, ours):
            alone = encoder(row[None, :length], encoder_hidden_states=image[None], return_dict=True)
            torch.testing.assert_close(first, alone.last_hidden_state[0, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_an_evaluation_compiles_nothing():
    """Each image has texts of other lengths: with run.compile, each would make a graph of every layer."""
    model = tiny_model().eval()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    encoder = model.text_encoder
    compile_layers(encoder, backend=count)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for longest in (3, 5, 9, 12, 20):
            lengths = torch.tensor([2, longest // 2 + 1, longest]).sort().values
            ids = torch.randint(5, 400, (3, longest), generator=generator)
            encode_with_image(encoder, ids, lengths, torch.randn(10, 128, generator=generator))
        assert not graphs
        encoder.encoder.layer[0](torch.randn(3, 5, 128), mode="text")
    assert graphs  # otherwise nothing would have been compiled at all
