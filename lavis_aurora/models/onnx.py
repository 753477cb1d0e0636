"""The towers of a merged BLIP as ONNX files, which onnxruntime and others run without torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lavis.models.blip_models.blip_image_text_matching import BlipITM
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from lavis.models.blip_models.blip_vqa import BlipVQA
from torch import Tensor, nn

from lavis_aurora.adapters.merging import merged, plain_model, refuse_gates
from lavis_aurora.adapters.switching import adapters_of
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.files import new_folder
from lavis_aurora.models.hugging_face import blip_processor
from lavis_aurora.models.scoring import evaluating


class ImageTower(nn.Module):
    """Pixels (batch, 3, height, width) to the normalised ITC feature (batch, d) and tokens (batch, tokens, width)."""

    def __init__(self, blip: Any) -> None:
        super().__init__()
        self.visual_encoder, self.vision_proj = blip.visual_encoder, blip.vision_proj

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        tokens = self.visual_encoder.forward_features(pixel_values)
        pooled = tokens[:, 0, : self.visual_encoder.embed_dim]
        return F.normalize(self.vision_proj(pooled), dim=-1), tokens


class TextTower(nn.Module):
    """Token ids and mask, (batch, length), to the normalised ITC feature (batch, d)."""

    def __init__(self, blip: Any) -> None:
        super().__init__()
        self.text_encoder, self.text_proj = blip.text_encoder, blip.text_proj

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See the class."""
        text = SimpleNamespace(input_ids=input_ids, attention_mask=attention_mask)
        hidden = self.text_encoder.forward_text(text).last_hidden_state
        return F.normalize(self.text_proj(hidden[:, 0]), dim=-1)


class Matching(nn.Module):
    """Tokens of pictures (batch, tokens, width) and texts (batch, length) to the probability of a match (batch,).

    The first token of a text becomes [ENC], as LAVIS has it.
    """

    def __init__(self, blip: Any) -> None:
        super().__init__()
        self.text_encoder, self.itm_head = blip.text_encoder, blip.itm_head
        self.first = int(blip.tokenizer.enc_token_id)

    def forward(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See the class."""
        ids = torch.cat([torch.full_like(input_ids[:, :1], self.first), input_ids[:, 1:]], dim=1)
        seen = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        hidden = self.text_encoder(
            ids,
            attention_mask=attention_mask,
            encoder_hidden_states=tokens,
            encoder_attention_mask=seen,
            return_dict=True,
        ).last_hidden_state
        score: Tensor = self.itm_head(hidden[:, 0]).softmax(dim=-1)[:, 1]
        return score


class Part(NamedTuple):
    """A file: what it computes, from which example, and what it gives.

    Attributes:
        inputs: by name; each of these dimensions may have another size: 0, and 1 of texts and tokens.
        outputs: names.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


def parts_of(blip: Any) -> dict[str, Part]:
    """What is exported of LAVIS's ``blip_retrieval`` or ``blip_image_text_matching``, by the name of its file."""
    side, device = blip.visual_encoder.patch_embed.img_size[0], next(blip.parameters()).device
    pixels = torch.zeros(2, 3, side, side, device=device)
    # No size is 1: torch would take it for fixed.
    ids = torch.full((2, 5), int(blip.tokenizer.pad_token_id), device=device)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        tokens = blip.visual_encoder.forward_features(pixels)
    return {
        "image_tower": Part(ImageTower(blip), {"pixel_values": pixels}, ("feature", "tokens")),
        "text_tower": Part(TextTower(blip), text, ("feature",)),
        "matching": Part(Matching(blip), {"tokens": tokens, **text}, ("score",)),
    }


def check_onnx() -> None:
    """Refuse where torch's exporter lacks what it writes with."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise AuroraError(f'ONNX needs onnx and onnxscript ({error}): pip install "lavis-aurora[onnx]"') from error


def export_onnx(model: nn.Module, folder: str | Path) -> list[str]:
    """Write a tuned retrieval model, the adapter merged, as ONNX files, with tokenizer and preprocessing.

    ``image_tower.onnx``, ``text_tower.onnx`` and ``matching.onnx`` (:class:`ImageTower`, :class:`TextTower`,
    :class:`Matching`), in single precision, for any batch, any length of texts and any number of tokens; weights of
    more than 1.5 GB lie beside them as ``.data``. Tokenizer and preprocessing are files of json for ``BlipProcessor``
    of transformers.

    Args:
        model: a BLIP for retrieval with an adapter, of this package or LAVIS's own in ``mode_approx``; afterwards it
            is as it was.
        folder: made; nothing may be there yet.

    Returns:
        The names of the ONNX files.

    Raises:
        AuroraError: onnx is not installed, the model is no BLIP for retrieval or not in single precision, the adapter
            cannot be merged, torch cannot export it, or the folder cannot be written.
    """
    check_onnx()
    sets = adapters_of(model)
    blip: Any = plain_model(model, sets)[0]
    _check(blip)
    refuse_gates(model, sets, "to export ONNX")
    with merged(model), evaluating(model), torch.no_grad(), new_folder(folder) as place:
        parts = parts_of(blip)
        for name, part in parts.items():
            _write(name, part, blip.text_encoder.config.max_position_embeddings, place)
        side = blip.visual_encoder.patch_embed.img_size[0]
        blip_processor(model, blip, side, place).save_pretrained(place)
    return [f"{name}.onnx" for name in parts]


def _check(blip: nn.Module) -> None:
    if isinstance(blip, BlipVQA):
        raise AuroraError(
            "ONNX: answers are found by a loop over the decoder (ranked candidates, or one token after the other), "
            "which is no graph; export --to transformers, which has generate"
        )
    if not isinstance(blip, (BlipRetrieval, BlipITM)):
        raise AuroraError(
            f"ONNX: exported are LAVIS's blip_retrieval and blip_image_text_matching, and {type(blip).__name__} is "
            f"neither; merge it (lavis-aurora merge) and use its own library's export"
        )
    dtypes = {parameter.dtype for parameter in blip.parameters()}
    if dtypes != {torch.float32}:
        raise AuroraError("ONNX: the model is not in single precision; call model.float() first")


def _write(name: str, part: Part, longest: int, folder: Path) -> None:
    """Export one part and save it."""
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=longest)
    free = {"pixel_values": {0: batch}, "tokens": {0: batch, 1: torch.export.Dim("tokens")}}
    shapes = tuple(free.get(key, {0: batch, 1: length}) for key in part.inputs)
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                part.module.eval(),
                tuple(part.inputs.values()),
                input_names=list(part.inputs),
                output_names=list(part.outputs),
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # its steps each have errors of their own
        line = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise AuroraError(f"ONNX: torch {torch.__version__} cannot export {name} ({line})") from error
    program.save(str(folder / f"{name}.onnx"))


@contextmanager
def _quiet(loggers: Sequence[str] = ("onnxscript", "onnx_ir", "torch.onnx")) -> Iterator[None]:
    """Without what the exporter says of names and passes of its own."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    try:
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
