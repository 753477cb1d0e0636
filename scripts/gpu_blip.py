"""The kernels of BLIP that scripts/check_gpu.py compares: attention, packed texts, matching's passes, losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

import torch
from bench_step import CAPTIONS, build, samples
from gpu_report import Case, Row, Setting, as_computed, compare
from torch import Tensor, nn

from lavis_aurora.adapters.companions import adapter_parameters
from lavis_aurora.encoders.fused import attend_in_matching
from lavis_aurora.encoders.towers import encode_visual


def model_of(task: str, method: str, setting: Setting, dropout: Optional[float] = 0.0, **built: int) -> nn.Module:
    """On the CPU, with random weights and an adapter that does something.

    Args:
        task, method, setting: which, and how large.
        dropout: of all layers; None leaves it as it is.
        built: ``checkpointed`` and ``mini_batch``, see :func:`bench_step.build`.
    """
    torch.manual_seed(0)
    model, _ = build(task, method, setting.size, **built)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if setting.tiny else 0.02))
    for module in model.modules() if dropout is not None else ():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model.train()


class LossCase(Case):
    """The losses of a step on two samples: of two, the hard negatives are the same wherever they are drawn."""

    def __init__(self, task: str, model: nn.Module, setting: Setting) -> None:
        super().__init__()
        self.model, self.made = model, (task, 2, setting.size, 0)

    def forward(self) -> Tensor:
        output = self.model(samples(*self.made, device=str(next(self.model.parameters()).device)))
        names = [name for name in ("loss_itc", "loss_itm") if output.get(name) is not None] or ["loss"]
        return torch.stack([output[name].float() for name in names])


class VisionCase(Case):
    """Tokens of pictures, through the fused attention of each block."""

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        super().__init__()
        self.model = model  # with the factors, which stand beside the tower
        self.register_buffer("pixels", samples("retrieval", 2, setting.size, 0, "cpu")["image"])

    def forward(self) -> Tensor:
        return encode_visual(self.model.visual_encoder, self.pixels).tokens


class TextCase(Case):
    """Texts with padding, alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.texts = model, list(CAPTIONS)

    def forward(self) -> Tensor:
        tokens = self.model.tokenize(self.texts, pad_to_longest=True, device=next(self.model.parameters()).device)
        keep = tokens.attention_mask.unsqueeze(-1)
        return self.model.text_encoder.forward_text(tokens).last_hidden_state * keep


class PackedCase(Case):
    """ITM logits of one picture with texts of several lengths, as reranking computes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        tokens = model.tokenize(list(CAPTIONS), pad_to_longest=True)
        order = tokens.attention_mask.sum(1).argsort(stable=True)
        self.ids, self.lengths = tokens.input_ids[order], tokens.attention_mask.sum(1)[order]
        width = model.visual_encoder.embed_dim
        self.register_buffer("image", torch.randn(50, width, generator=torch.Generator().manual_seed(2)))

    def forward(self) -> Tensor:
        return self.model.match_logits(self.ids, self.lengths, as_computed(self.image))


class MatchingCase(Case):
    """Attention of matching's three passes; ``shared``: the wrong pictures are of the batch."""

    def __init__(self, shared: bool, setting: Setting) -> None:
        super().__init__()
        heads, length, keys, width = (2, 5, 10, 8) if setting.tiny else (12, 35, 577, 64)
        generator, batch = torch.Generator().manual_seed(0), 4
        shapes = [(3 * batch, heads, length, width), *2 * [(batch * (1 if shared else 2), heads, keys, width)]]
        self.qkv = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)
        self.register_buffer("wrong", torch.tensor([1, 2, 3, 0]))
        self.shared = shared

    def forward(self) -> Tensor:
        return attend_in_matching(*map(as_computed, self.qkv), self.wrong if self.shared else None)


def check_kernels(setting: Setting) -> Iterator[Row]:
    """What BLIP computes: attention, packed texts, matching's passes, losses with their gradients."""
    yield from compare("matching passes, pictures of the batch", MatchingCase(True, setting), setting)
    yield from compare("matching passes, pictures of all processes", MatchingCase(False, setting), setting)
    model = model_of("retrieval", "aurora-64", setting)
    yield from compare("fused attention, vision tower", VisionCase(model, setting), setting, depth=4)
    yield from compare("fused attention, text tower", TextCase(model), setting, depth=4)
    # A step also moves the teacher and fills the queues: each computation has a copy of the model.
    yield from compare("retrieval losses", LossCase("retrieval", model, setting), setting, depth=4)
    yield from compare("packed texts, gated", PackedCase(model.eval().requires_grad_(False)), setting, depth=4)
    yield from compare("VQA loss", LossCase("vqa", model_of("vqa", "aurora-64", setting), setting), setting, depth=4)
