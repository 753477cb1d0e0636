"""The product computes what docs/reference.py says; the towers under the reference are LAVIS's own."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from omegaconf import OmegaConf
from tiny import activate, lavis_towers, tiny_model
from torch import Tensor, nn

from lavis_aurora import GateConfig, ModeApproxConfig
from lavis_aurora.alignment.context import enhance_context
from lavis_aurora.alignment.gate import AffineGate, QueryGate
from lavis_aurora.config.models import RetrievalAuroraConfig
from lavis_aurora.mode_approx.factors import FactorSet, ModeFactors
from lavis_aurora.mode_approx.layers import ModeApproxLinear
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora

PATH = Path(__file__).parents[2] / "docs" / "reference.py"
SHAPES = {"vision.q": (4, 6), "vision.k": (4, 6), "text.q": (5, 6), "text.v": (5, 3)}
B, L, D = 3, 5, 4


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load()


def reference_factors(one: FactorSet, shapes: list[tuple[int, int]]) -> nn.Module:
    """The reference's factors with the numbers of a set of the product."""
    factors = reference.Factors(shapes, one.config.rank, one.config.scale)
    renamed = {key.replace("coefficients", "lambda_"): value for key, value in one.state_dict().items()}
    factors.load_state_dict(renamed)
    return factors


def random_values(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("rank", [1, 3])
def test_updates_are_the_reference(rank):
    torch.manual_seed(0)
    product = random_values(ModeFactors(SHAPES, ModeApproxConfig(rank=rank, scale=1.7)))
    factors = reference_factors(product.sets["default"], list(SHAPES.values()))
    for k, slot in enumerate(SHAPES):
        torch.testing.assert_close(product.delta_weight(slot), factors.delta(k).t())


def test_start_is_the_reference():
    """The same draws from the same seed."""
    shapes = {"a": (4, 6), "b": (4, 6)}
    torch.manual_seed(0)
    product = ModeFactors(shapes, ModeApproxConfig(rank=3)).sets["default"]
    torch.manual_seed(0)
    factors = reference.Factors(list(shapes.values()), R=3)
    for key, value in factors.state_dict().items():
        assert torch.equal(value, product.state_dict()[key.replace("lambda_", "coefficients")])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("attn.qkv", ("query", "key", "value")),
        ("mlp.fc1", [f"block{i}" for i in range(4)]),
        ("mlp.fc2", [f"block{i}" for i in range(4)]),
    ],
)
def test_a_linear_layer_with_several_slots_is_the_reference(name, parts):
    model = activate(tiny_model(mode_approx={"rank": 8, "targets": "all_linear"}))
    slots, name = list(model.mode_approx.slots), f"visual_encoder.blocks.1.{name}"
    layer = model.get_submodule(name)
    factors = reference_factors(model.mode_approx.sets["default"], list(model.mode_approx.slots.values()))
    plain = nn.Linear(layer.in_features, layer.out_features)
    plain.load_state_dict({key: layer.state_dict()[key] for key in ("weight", "bias")})
    rows = [slots.index(f"{name}.{part}") for part in parts]
    adapted = reference.AdaptedLinear(plain, factors, rows)
    x = torch.randn(2, 7, layer.in_features)
    torch.testing.assert_close(layer(x), adapted(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["residual", "convex"])
def test_gates_are_the_reference(form):
    torch.manual_seed(0)
    product, gate = random_values(QueryGate(D, GateConfig(form=form))), reference.Gate(D, form)
    gate.load_state_dict(product.state_dict())
    t, f = torch.randn(2, B, L, D)
    is_text = torch.arange(L) < torch.tensor([5, 2, 1])[:, None]
    torch.testing.assert_close(product(t, f, is_text), gate(t, f, is_text))


def test_the_affine_gate_is_the_reference():
    torch.manual_seed(0)
    product = random_values(AffineGate(D, GateConfig(form="affine")))
    t, f = torch.randn(2, B, L, D)
    expected = reference.affine_gate(t, f, product.gamma_t, product.beta_t, product.gamma_f, product.beta_f)
    torch.testing.assert_close(product(t, f), expected)


@pytest.mark.parametrize("form", ["attention", "mean", "random"])
def test_context_is_the_reference(form):
    fusion, queries = torch.randn(9, D), torch.randn(B, D)
    results = []
    for enhance in (enhance_context, reference.enhance_context):
        torch.manual_seed(0)
        results.append(enhance(fusion, queries, form))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("width", "layers", "rank"), [(768, 12, 64), (768, 12, 128), (128, 3, 8)])
def test_counts_follow_the_formula(width, layers, rank):
    """Appendix E, in the reference and in the product: 9L 2r + 2dr + 2Ld."""
    shapes = [(width, width)] * 9 * layers
    plain = [reference.Factors(shapes, rank), *(reference.Gate(width) for _ in range(layers))]
    slots = {str(k): shape for k, shape in enumerate(shapes)}
    gates = [QueryGate(width, GateConfig()) for _ in range(layers)]
    product = [FactorSet(slots, ModeApproxConfig(rank=rank)), *gates]
    expected = 9 * layers * 2 * rank + 2 * width * rank + 2 * layers * width
    for modules in (plain, product):
        assert sum(p.numel() for module in modules for p in module.parameters()) == expected


def test_the_moving_average_is_the_reference():
    """After k steps in which factors and heads change."""
    model = tiny_model(momentum=0.9)
    first = plain_model(model)
    for _ in range(5):
        for module in (model.mode_approx.sets["default"], model.vision_proj, model.text_proj):
            random_values(module)
        model._momentum_update()
        now = plain_model(model)
        reference.update_momentum(now.factors, first.factors_m, m=0.9)
        reference.update_momentum(now.heads, first.heads_m, m=0.9)
    for ours, expected in ((now.factors_m, first.factors_m), (now.heads_m, first.heads_m)):
        torch.testing.assert_close(ours.state_dict(), expected.state_dict())


class PlainModel(nn.Module):
    """LAVIS's own towers with the reference's layers and gates in them, as the reference asks for a model."""

    def __init__(self, cfg: RetrievalAuroraConfig) -> None:
        super().__init__()
        self.visual_encoder, self.text_encoder = lavis_towers(OmegaConf.structured(cfg))

    def image(self, pixels: Tensor) -> Tensor:
        return self.visual_encoder.forward_features(pixels)

    def text(self, words: Tensor, is_text: Tensor) -> Tensor:
        mask = is_text.long()
        return self.text_encoder(words, attention_mask=mask, return_dict=True, mode="text").last_hidden_state

    def fuse(self, words: Tensor, is_text: Tensor, image: Tensor) -> Tensor:
        words = torch.cat([torch.full_like(words[:, :1], self.enc_token), words[:, 1:]], dim=1)
        output = self.text_encoder(
            words, attention_mask=is_text.long(), encoder_hidden_states=image, return_dict=True
        )
        return output.last_hidden_state


def plain_model(product: BlipRetrievalAurora) -> PlainModel:
    """The reference's model with the numbers of the product."""
    model = PlainModel(product.settings)
    state = product.state_dict()
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    sets, shapes = product.mode_approx.sets, list(product.mode_approx.slots.values())
    model.factors, model.factors_m = (reference_factors(sets[name], shapes) for name in ("default", "momentum"))
    for name, layer in product.named_modules():
        if isinstance(layer, ModeApproxLinear):
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, reference.AdaptedLinear(getattr(owner, child), model.factors, list(layer.slots)))
    for layer, gated in zip(model.text_encoder.encoder.layer, product.text_encoder.encoder.layer):
        add_gate(layer, getattr(gated, "gate", getattr(gated.crossattention, "gate", None)))
    heads = {"image": product.vision_proj, "text": product.text_proj}
    model.heads = copy.deepcopy(nn.ModuleDict(heads))
    model.heads_m = copy.deepcopy(nn.ModuleDict({"image": product.vision_proj_m, "text": product.text_proj_m}))
    model.itm_head, model.tau = copy.deepcopy(product.itm_head), copy.deepcopy(product.temp)
    model.context, model.enc_token = product.context_form, product.tokenizer.enc_token_id
    return model


def add_gate(layer: nn.Module, gate: nn.Module | None) -> None:
    """The reference's gate with the numbers of the product's, hooked into a layer of LAVIS's BERT."""
    if isinstance(gate, QueryGate):
        plain = reference.Gate(len(gate.gamma), gate.form)
        plain.load_state_dict(gate.state_dict())
        layer.crossattention.gate = plain

        def combine(module, args, output):
            t, mask, (f, *rest) = args[0], args[1], output
            return (plain(t, f, mask[:, 0, 0] == 0), *rest)

        layer.crossattention.register_forward_hook(combine)
    elif isinstance(gate, AffineGate):
        numbers = [p.detach().clone() for p in (gate.gamma_t, gate.beta_t, gate.gamma_f, gate.beta_f)]
        seen = []
        layer.crossattention.register_forward_hook(lambda module, args, output: seen.extend((args[0], output[0])))

        def correct(module, args, output):
            if not seen:  # a text alone
                return output
            t, f = seen
            seen.clear()
            return (output[0] + reference.affine_gate(t, f, *numbers), *output[1:])

        layer.register_forward_hook(correct)


CAPTIONS = ["a red circle", "a big blue square and a small star", "a ring", "a small pink heart", "a bar"]


def both_losses(product: BlipRetrievalAurora, plain: PlainModel, queue: list[Tensor], step: int, ids: list[int]):
    """(ITC, ITM) of the product and of the reference for the same batch, in the second epoch of ten steps."""
    pixels = torch.randn(len(ids), 3, 48, 48, generator=torch.Generator().manual_seed(step))
    samples = {"image": pixels, "text_input": CAPTIONS[: len(ids)], "image_id": torch.tensor(ids)}
    torch.manual_seed(step)
    output = product({**samples, "epoch": 1, "iters": step, "num_iters_per_epoch": 10})
    text = product.tokenize(samples["text_input"])
    torch.manual_seed(step)
    losses = reference.retrieval_losses(
        plain,
        queue,
        pixels,
        text.input_ids,
        text.attention_mask.bool(),
        samples["image_id"],
        a=product.alpha * (10 + step) / 20,
        noise=torch.Generator().manual_seed(product._negative_seed + 10 + step),
        m=product.momentum,
    )
    return (output.loss_itc, output.loss_itm), losses


@pytest.mark.parametrize(
    ("gate", "context", "perturbed", "targets"),
    [
        pytest.param("residual", "attention", False, None, marks=pytest.mark.slow),
        ("residual", "attention", True, None),
        pytest.param("residual", "attention", True, "all_linear", marks=pytest.mark.slow),
        ("convex", "mean", True, None),
        ("affine", "random", True, None),
        ("none", "none", True, None),
    ],
)
def test_losses_are_the_reference(gate, context, perturbed, targets):
    """In training mode, over steps whose queue wraps around; the tiny model drops nothing at random."""
    method = {"mode_approx": {"targets": targets}, "gate": {"form": gate}, "context": {"form": context}}
    product = tiny_model(queue_size=7, momentum=0.8, **method).train()
    if perturbed:
        activate(product, std=0.1 if targets else 0.2)
    plain = plain_model(product).train()
    queue = [product.image_queue.t().clone(), product.text_queue.t().clone(), product.idx_queue[0].clone()]
    for step, ids in enumerate([[0, 1, 2, 2, 4], [5, 6, 7], [0, 1, 1, 3]]):
        ours, expected = both_losses(product, plain, queue, step, ids)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [None, "all_linear"])
def test_gradients_are_the_reference(targets):
    model = tiny_model(queue_size=7, mode_approx={"targets": targets})
    product = activate(model, std=0.1 if targets else 0.2).train()
    plain = plain_model(product).train()
    queue = [product.image_queue.t().clone(), product.text_queue.t().clone(), product.idx_queue[0].clone()]
    for losses in both_losses(product, plain, queue, step=0, ids=[0, 1, 2, 2, 4]):
        sum(losses).backward()
    one = product.mode_approx.sets["default"]
    pairs = {name.replace("lambda_", "coefficients"): p for name, p in plain.factors.named_parameters()}
    expected = [(p.grad, pairs[name].grad) for name, p in one.named_parameters()]
    for gated, layer in zip(product.text_encoder.encoder.layer, plain.text_encoder.encoder.layer):
        gates = gated.crossattention.gate, layer.crossattention.gate
        expected += [(p.grad, q.grad) for p, q in zip(*(gate.parameters() for gate in gates))]
    for a, b in ((product.vision_proj, plain.heads["image"]), (product.itm_head, plain.itm_head)):
        expected.append((a.weight.grad, b.weight.grad))
    for ours, theirs in expected:
        assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max().clamp(min=1e-4)


def test_pairs_without_a_negative_do_not_count():
    product = tiny_model(queue_size=7).train()
    plain = plain_model(product).train()
    queue = [product.image_queue.t().clone(), product.text_queue.t().clone(), product.idx_queue[0].clone()]
    ours, expected = both_losses(product, plain, queue, step=0, ids=[4, 4, 4])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_the_reference_runs_and_needs_torch_alone():
    listing = "import sys, runpy; runpy.run_path(sys.argv[1], run_name='__main__'); print(*sys.modules)"
    command = [sys.executable, "-c", listing, str(PATH)]
    *lines, modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "130,560" in lines[0] and "242,688" in lines[1]
    errors = [float(line.rpartition(" ")[2]) for line in lines[2:]]
    assert errors[-1] < 1e-2 * errors[0]
    assert not {"lavis", "lavis_aurora", "transformers"} & set(modules.split())
