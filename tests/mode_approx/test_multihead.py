"""nn.MultiheadAttention with the update folded in, against torch's own with the explicit weight."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lavis_aurora import AuroraError, ModeApproxConfig, inject_mode_approx
from lavis_aurora.mode_approx.layers import ModeApproxLinear, ModeApproxMultiheadAttention

WIDTH, HEADS, RANK = 8, 2, 3
OTHER = {"kdim": 6, "vdim": 5}


class Block(nn.Module):
    """An attention of which a test reads everything."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **settings)

    def forward(self, query, key, value, **settings):
        return self.attn(query, key, value, **settings)


def adapted(dtype: torch.dtype = torch.float64, **settings) -> tuple[Block, Block]:
    """A block whose factors are random, and a plain one to which the explicit CP sum was added."""
    torch.manual_seed(0)
    plain = Block(**settings).to(dtype).eval()
    nn.init.normal_(plain.attn.in_proj_bias)
    block = copy.deepcopy(plain)
    factors = inject_mode_approx(block, ModeApproxConfig(rank=RANK, scale=0.1)).to(dtype)
    for parameter in factors.parameters():
        nn.init.normal_(parameter)
    add_explicit_sum(plain.attn, factors)
    return block, plain


def add_explicit_sum(attention: nn.MultiheadAttention, factors) -> None:
    """W_k += s sum_r lambda_kr P_kr U_:r V_:r^T, with loops, for query, key and value."""
    one = factors.sets["default"]
    with torch.no_grad():
        for k, (part, letter) in enumerate(zip(("query", "key", "value"), "qkv")):
            d_in, d_out = factors.slots[f"attn.{part}"]
            weight = getattr(attention, f"{letter}_proj_weight")
            if weight is None:
                weight = attention.in_proj_weight[k * WIDTH : (k + 1) * WIDTH]
            u, v = one.U[str(d_in)], one.V[str(d_out)]
            s = one.config.scale / (0.1 * math.sqrt(d_in * RANK))
            for r in range(RANK):
                weight += s * one.coefficients[k, r] * one.P[k, r] * torch.outer(v[:, r], u[:, r])


def inputs(batch_first: bool = False, **widths) -> list[torch.Tensor]:
    """Query, key and value of two sequences, 4 and 5 long."""
    generator = torch.Generator().manual_seed(1)
    key_length, widths = 5, [WIDTH, widths.get("kdim", WIDTH), widths.get("vdim", WIDTH)]
    tensors = [
        torch.randn(length, 2, width, dtype=torch.float64, generator=generator)
        for length, width in zip((4, key_length, key_length), widths)
    ]
    return [t.transpose(0, 1) for t in tensors] if batch_first else tensors


def same(ours, theirs) -> None:
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


MASKS = {
    "none": {},
    "causal": {"attn_mask": torch.ones(4, 5).triu(2).bool()},
    "additive": {"attn_mask": torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
}


@pytest.mark.parametrize("settings", [{}, OTHER, {"add_bias_kv": True}, {"bias": True, "add_zero_attn": True}])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_it_computes_with_the_explicit_weight(settings, mask, batch_first):
    block, plain = adapted(batch_first=batch_first, **settings)
    assert type(block.attn) is ModeApproxMultiheadAttention
    args = inputs(batch_first, **settings)
    for options in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        same(block(*args, **MASKS[mask], **options), plain(*args, **MASKS[mask], **options))


@pytest.mark.parametrize("settings", [{}, OTHER])
def test_the_slots_are_query_key_and_value(settings):
    block, _ = adapted(**settings)
    widths = {"attn.query": WIDTH, "attn.key": settings.get("kdim", WIDTH), "attn.value": settings.get("vdim", WIDTH)}
    assert block.mode_approx.slots == {name: (d_in, WIDTH) for name, d_in in widths.items()}


@pytest.mark.parametrize("settings", [{}, OTHER])
def test_gradients_are_those_of_the_explicit_weight(settings):
    block, _ = adapted(**settings)
    parameters = list(block.mode_approx.parameters())
    args = [t.requires_grad_() for t in inputs(**settings)]
    ours = torch.autograd.grad(block(*args)[0].sin().sum(), [*args, *parameters])
    attention, delta = block.attn, block.mode_approx.delta_weight
    weights = attention._parameters
    rows = [f"attn.{part}" for part in ("query", "key", "value")]
    if settings:
        split = [weights[f"{x}_proj_weight"] + delta(row) for x, row in zip("qkv", rows)]
    else:
        split = (weights["in_proj_weight"] + torch.cat([delta(row) for row in rows])).chunk(3)
    biases = attention.in_proj_bias.chunk(3)
    heads = [
        F.linear(x, weight, bias).unflatten(-1, (HEADS, -1)).permute(1, 2, 0, 3)
        for x, weight, bias in zip(args, split, biases)
    ]
    scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
    out = (scores.softmax(-1) @ heads[2]).permute(2, 0, 1, 3).flatten(2)
    explicit = F.linear(out, attention.out_proj.weight, attention.out_proj.bias)
    theirs = torch.autograd.grad(explicit.sin().sum(), [*args, *parameters])
    same(ours, theirs)


@pytest.mark.parametrize("settings", [{}, OTHER])
def test_gradcheck(settings):
    block, _ = adapted(**settings)
    parameters = list(block.mode_approx.parameters())
    args = [t[:2, :1].requires_grad_() for t in inputs(**settings)]
    assert torch.autograd.gradcheck(lambda *x: block(*x[:3])[0], (*args, *parameters))


@pytest.mark.parametrize("settings", [{}, OTHER])
def test_keys_order_and_identity_of_parameters_stay(settings):
    plain = Block(**settings)
    names = [(name, id(p)) for name, p in plain.attn.named_parameters()]
    keys = list(plain.state_dict())
    inject_mode_approx(plain, ModeApproxConfig(rank=2))
    assert [(name, id(p)) for name, p in plain.attn.named_parameters()] == names
    assert [key for key in plain.state_dict() if not key.startswith("mode_approx.")] == keys
    assert not any(p.requires_grad for p in plain.attn.parameters())


def test_step_0_and_disabled_are_the_plain_attention_bit_for_bit():
    torch.manual_seed(0)
    plain = Block().double()
    block = copy.deepcopy(plain)
    factors = inject_mode_approx(block, ModeApproxConfig(rank=2))
    args = inputs()
    assert torch.equal(block(*args)[0], plain(*args)[0])
    nn.init.normal_(factors.sets["default"].V[str(WIDTH)])
    assert not torch.equal(block(*args)[0], plain(*args)[0])
    with factors.disabled():
        assert torch.equal(block(*args)[0], plain(*args)[0])


class Native:
    """Counts torch's fused kernels, which take the weights of the layer as they are."""

    def __init__(self, monkeypatch, name: str) -> None:
        self.calls, self.inner = 0, getattr(torch, name)
        monkeypatch.setattr(torch, name, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)


def test_the_fast_path_of_the_attention_computes_with_the_update(monkeypatch):
    block, plain = adapted(torch.float32, batch_first=True)
    native = Native(monkeypatch, "_native_multi_head_attention")
    x = torch.randn(2, 4, WIDTH)
    with torch.no_grad():
        ours = block(x, x, x, need_weights=False)[0]
        theirs = plain(x, x, x, need_weights=False)[0]
        assert native.calls == 2
        torch.testing.assert_close(ours, theirs)
        with block.mode_approx.disabled():
            assert not torch.allclose(ours, block(x, x, x, need_weights=False)[0])


def test_the_fast_path_of_the_encoder_layer_computes_with_the_update(monkeypatch):
    torch.manual_seed(0)
    plain = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False
    ).eval()
    model = copy.deepcopy(plain)
    factors = inject_mode_approx(model, ModeApproxConfig(rank=RANK), [r"layers\.\d+\.self_attn"])
    nn.init.normal_(factors.sets["default"].V[str(WIDTH)], std=0.3)
    x = torch.randn(2, 4, WIDTH)
    native = Native(monkeypatch, "_transformer_encoder_layer_fwd")
    with torch.no_grad():
        fast = model(x)
        assert native.calls == 2
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = model(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert native.calls == 2
        torch.testing.assert_close(fast, slow)
        with factors.disabled():
            torch.testing.assert_close(model(x), plain(x))
        assert not torch.allclose(fast, plain(x), atol=1e-3)
    calls = native.calls
    # With a gradient to compute, torch takes the other way by itself.
    model(x).sum().backward()
    assert native.calls == calls and factors.sets["default"].V[str(WIDTH)].grad.abs().sum() > 0


def test_out_proj_may_be_a_target_too():
    block = Block().double()
    x = inputs()
    before = block(*x)[0]
    factors = inject_mode_approx(block, ModeApproxConfig(rank=2), [r"attn\.out_proj"]).double()
    assert isinstance(block.attn.out_proj, ModeApproxLinear)
    torch.testing.assert_close(block(*x)[0], before)
    nn.init.normal_(factors.sets["default"].V[str(WIDTH)])
    delta = factors.delta_weight("attn.out_proj")
    plain = Block().double()
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("mode_approx")})
    with torch.no_grad():
        plain.attn.out_proj.weight += delta
    torch.testing.assert_close(block(*x)[0], plain(*x)[0])


def test_a_subclass_with_a_forward_of_its_own_is_refused():
    class Own(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(AuroraError, match="target attn is a Own with a forward of its own"):
        inject_mode_approx(nn.ModuleDict({"attn": Own(WIDTH, HEADS)}), ModeApproxConfig())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_factors_over_a_half_precision_attention(dtype):
    block, plain = adapted(torch.float32)
    args = [t.float() for t in inputs()]
    expected = plain(*args)[0]
    block.attn.to(dtype)
    out = block(*(t.to(dtype) for t in args))[0]
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)
    out.float().sum().backward()
    assert block.mode_approx.sets["default"].P.grad.dtype == torch.float32
