import math

import pytest
import torch

from lavis_aurora import GateConfig
from lavis_aurora.alignment.gate import AffineGate, QueryGate

B, L, D = 3, 5, 4


def random_gate(form: str) -> QueryGate:
    torch.manual_seed(0)
    gate = QueryGate(D, GateConfig(form=form)).double()
    torch.nn.init.normal_(gate.gamma)
    torch.nn.init.normal_(gate.beta)
    return gate


def plain(gate: QueryGate, t: torch.Tensor, f: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Paper 3.3 in loops; positions from ``lengths`` on are padding."""
    gamma, beta = gate.gamma.tolist(), gate.beta.tolist()
    out = torch.empty_like(f)
    for b in range(B):
        new = [[math.tanh(gamma[d] * t[b, i, d]) + beta[d] for d in range(D)] for i in range(L)]
        text = range(lengths[b])
        similarity = [sum(f[b, i, d] * new[j][d] for j in text for d in range(D)) for i in text]
        total = sum(math.exp(s) for s in similarity)
        for i in range(L):
            g = math.exp(similarity[i]) / total if i in text else 0.0
            for d in range(D):
                base = g * f[b, i, d] if gate.form == "convex" else f[b, i, d]
                out[b, i, d] = base + (1 - g) * new[i][d]
    return out


@pytest.mark.parametrize("form", ["residual", "convex"])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 2, 1]])
def test_forms_against_loops(form, lengths):
    gate = random_gate(form)
    t, f = torch.randn(2, B, L, D, dtype=torch.float64)
    keep = torch.arange(L) < torch.tensor(lengths)[:, None]
    torch.testing.assert_close(gate(t, f, keep), plain(gate, t, f, lengths))
    if lengths == [5, 5, 5]:
        torch.testing.assert_close(gate(t, f), gate(t, f, keep))


def test_text_does_not_depend_on_its_padding():
    gate = random_gate("residual")
    t, f = torch.randn(2, 1, L, D, dtype=torch.float64)
    keep = torch.arange(L)[None] < 3
    torch.testing.assert_close(gate(t, f, keep)[:, :3], gate(t[:, :3], f[:, :3]))


def test_residual_is_exactly_f_at_the_start_and_has_gradients():
    gate = QueryGate(D, GateConfig())
    t, f = torch.randn(2, B, L, D)
    out = gate(t, f)
    assert torch.equal(out, f)
    (out * torch.randn(B, L, D)).sum().backward()
    assert gate.gamma.grad.abs().min() > 0
    assert gate.beta.grad.abs().min() > 0


def test_convex_divides_f_by_the_length_at_the_start():
    t, f = torch.randn(2, B, L, D)
    torch.testing.assert_close(QueryGate(D, GateConfig(form="convex"))(t, f), f / L)


def test_affine_is_the_released_codes_form():
    torch.manual_seed(0)
    gate = AffineGate(D, GateConfig(form="affine"))
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    t, f = torch.randn(2, B, L, D)
    expected = 0.1 * (gate.gamma_t * t + gate.beta_t) + 0.1 * (gate.gamma_f * f + gate.beta_f)
    torch.testing.assert_close(gate(t, f), expected)
    assert sum(p.numel() for _, p in gate.adapter_parameters()) == 4 * D


@pytest.mark.parametrize(("init", "value"), [("zeros", 0.0), ("ones", 1.0)])
def test_init(init, value):
    for gate in (QueryGate(D, GateConfig(init=init)), AffineGate(D, GateConfig(form="affine", init=init))):
        for _, parameter in gate.adapter_parameters():
            assert torch.equal(parameter.data, torch.full((D,), value))
