import math

import pytest
import torch

from lavis_aurora.alignment.context import enhance_context

PAIRS, B, D = 6, 2, 4


def test_attention_is_equation_5():
    torch.manual_seed(0)
    f, t = torch.randn(PAIRS, D, dtype=torch.float64), torch.randn(B, D, dtype=torch.float64)
    expected = f.clone()
    for i in range(PAIRS):
        weights = [math.exp(sum(f[i, d] * t[j, d] for d in range(D))) for j in range(B)]
        for j in range(B):
            expected[i] += weights[j] / sum(weights) * t[j]
    torch.testing.assert_close(enhance_context(f, t), expected)


def test_other_forms():
    f, t = torch.randn(PAIRS, D), torch.randn(B, D)
    assert enhance_context(f, t, "none") is f
    torch.testing.assert_close(enhance_context(f, t, "mean"), f + (t[0] + t[1]) / 2)
    torch.manual_seed(3)
    random = enhance_context(f, t, "random")
    torch.manual_seed(3)
    torch.testing.assert_close(random, enhance_context(f, torch.randn_like(t)))


@pytest.mark.parametrize("form", ["attention", "mean"])
def test_gradients_reach_both_sides(form):
    f, t = torch.randn(PAIRS, D, requires_grad=True), torch.randn(B, D, requires_grad=True)
    enhance_context(f, t, form).square().sum().backward()
    assert f.grad.abs().min() > 0
    assert t.grad.abs().min() > 0
