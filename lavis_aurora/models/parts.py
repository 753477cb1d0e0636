"""Less kept for the backward pass: a batch computed in parts, and activations made again from what is kept anyway."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lavis.models.med import XBertEncoder
from lavis.models.vit import VisionTransformer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import BatchEncoding

from lavis_aurora.encoders.towers import FrozenTokens, VisualFeatures, encode_visual, frozen_tokens


def compute_in_parts(
    compute: Callable[..., Iterable[Tensor]], size: int | None, *batch: Tensor, whole: tuple[Tensor, ...] = ()
) -> list[Tensor]:
    """What ``compute`` gives for a batch, of which one part's activations at a time are kept.

    In the backward pass each part is computed again, with the same draws of dropout: gradients are those of the whole
    batch, at the cost of a second forward pass (gradient caching, Gao et al., 2021, which losses over pairs need in
    place of accumulated gradients).

    Args:
        compute: from parts of the batch, and ``whole``, to tensors with a row for each sample.
        size: samples of a part; None: all of them at once.
        batch: tensors with a row for each sample.
        whole: further arguments.

    Returns:
        The tensors of all parts, one after the other.
    """
    if size is None or size >= len(batch[0]):
        return list(compute(*batch, *whole))
    parts = zip(*(torch.split(tensor, size) for tensor in batch))
    if torch.is_grad_enabled():
        computed = [checkpoint(compute, *part, *whole, use_reentrant=False) for part in parts]
    else:
        computed = [compute(*part, *whole) for part in parts]
    return [torch.cat(tensors) for tensors in zip(*computed)]


def frozen_tokens_in_parts(encoder: VisionTransformer, size: int | None, visual: Tensor) -> FrozenTokens | None:
    """:func:`lavis_aurora.encoders.towers.frozen_tokens` of a batch, ``size`` samples at a time."""
    first, *rest = (frozen_tokens(encoder, part) for part in torch.split(visual, size or len(visual)))
    if first is None or not rest:
        return first
    return first._replace(tokens=torch.cat([first.tokens, *(part.tokens for part in rest if part is not None)]))


def encode_visual_in_parts(
    encoder: VisionTransformer, size: int | None, visual: Tensor, frozen: FrozenTokens | None
) -> VisualFeatures:
    """:func:`lavis_aurora.encoders.towers.encode_visual` of a batch, ``size`` samples at a time."""

    def encode(visual: Tensor, *tokens: Tensor) -> VisualFeatures:
        known = None if frozen is None else frozen._replace(tokens=tokens[0].flatten(0, 1))
        return encode_visual(encoder, visual, known)

    # A video has the tokens of all its frames.
    given = () if frozen is None else (frozen.tokens.unflatten(0, (len(visual), -1)),)
    return VisualFeatures(*compute_in_parts(encode, size, visual, *given))


def encode_text_in_parts(encoder: XBertEncoder, size: int | None, text: BatchEncoding) -> Tensor:
    """Tokens of texts alone, (batch, length, d), ``size`` texts at a time."""

    def encode(ids: Tensor, mask: Tensor) -> list[Tensor]:
        return [encoder.forward_text(BatchEncoding({"input_ids": ids, "attention_mask": mask})).last_hidden_state]

    [tokens] = compute_in_parts(encode, size, text.input_ids, text.attention_mask)
    return tokens


class SavedTensor(NamedTuple):
    """A tensor for the backward pass, and its version: hooks take over what torch checks it for."""

    tensor: Tensor
    version: int

    @staticmethod
    def of(tensor: Tensor) -> SavedTensor:
        # Detached: an operation that saves its own result would keep itself alive.
        return SavedTensor(tensor.detach(), tensor._version)

    def restore(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was changed in place"
            )
        return self.tensor


class _Activation(NamedTuple):
    """A result that is computed again, by its function of saved tensors."""

    dtype: torch.dtype
    shape: torch.Size
    function: Callable[..., Tensor]
    inputs: tuple[SavedTensor, ...]

    def restore(self) -> Tensor:
        with torch.no_grad():
            return self.function(*(saved.restore() for saved in self.inputs)).to(self.dtype).view(self.shape)


@contextmanager
def recomputed_activations(model: nn.Module) -> Iterator[None]:
    """Inside the block no result of GELU or LayerNorm is kept for the backward pass, which computes it again.

    Both keep their input for their own gradient, and cost little beside the products around them, so narrow ones are
    kept; gradients are the same bits. What is computed in parts, in checkpoints or compiled keeps what these keep.

    Args:
        model: whose normalisations these are.
    """
    # A saved normalisation does not say its epsilon.
    epsilons: dict[int, set[float]] = {}
    for norm in model.modules():
        if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
            epsilons.setdefault(norm.weight.data_ptr(), set()).add(norm.eps)

    def pack(tensor: Tensor) -> SavedTensor | _Activation:
        return _activation(tensor, epsilons) or SavedTensor.of(tensor)

    with saved_tensors_hooks(pack, lambda saved: saved.restore()):
        yield


_ACTIVATIONS = ("GeluBackward0", "NativeLayerNormBackward0")
_WIDE = 768  # features; in the tiny model, of 128, computing them again was a twelfth of a step of full tuning


def _activation(tensor: Tensor, epsilons: Mapping[int, Collection[float]]) -> _Activation | None:
    """How a tensor is computed again, if it is a result of GELU or LayerNorm whose input is kept anyway.

    ``epsilons`` are those of normalisations by the address of their weight; it takes one to be sure.
    """
    node = _made_by(tensor) if tensor.dim() and tensor.shape[-1] >= _WIDE else None
    # Inputs that are computed again themselves would be computed now, and kept.
    if _name(node) not in _ACTIVATIONS or _name(node.next_functions[0][0]) in _ACTIVATIONS:
        return None
    inputs: tuple[Tensor, ...]
    if _name(node) == "GeluBackward0":
        function, inputs = partial(F.gelu, approximate=node._saved_approximate), (node._saved_self,)
    else:
        inputs = (node._saved_input, node._saved_weight, node._saved_bias)
        found = () if inputs[1] is None else epsilons.get(inputs[1].data_ptr(), ())
        if len(found) != 1:
            return None
        function = partial(_layer_norm, *found)
    if inputs[0].device != tensor.device:
        return None
    return _Activation(tensor.dtype, tensor.shape, function, tuple(map(SavedTensor.of, inputs)))


def _name(node: Any) -> str:
    return "" if node is None else node.name()


def _made_by(tensor: Tensor) -> Any:
    """The node whose result a tensor is, in another shape and precision at most; None where none is known."""
    if tensor._version or not tensor.is_contiguous():
        return None  # changed in place, which no node need tell
    node, casts = tensor.grad_fn, 0
    # A linear layer saves its input with one dimension for all rows, and in the precision that it computes in.
    while _name(node) == "ViewBackward0" or (_name(node) == "ToCopyBackward0" and not casts):
        casts += _name(node) == "ToCopyBackward0"
        node = node.next_functions[0][0]
    return node


def _layer_norm(eps: float, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)
