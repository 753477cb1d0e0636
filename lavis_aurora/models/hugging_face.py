"""BLIP in Hugging Face's names: one table, read both ways; and a tuned model as transformers has it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from lavis.models.blip_models.blip_caption import BlipCaption
from lavis.models.blip_models.blip_image_text_matching import BlipITM
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from lavis.models.blip_models.blip_vqa import BlipVQA
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertTokenizer

from lavis_aurora.adapters.merging import merged_state_dict, plain_model
from lavis_aurora.adapters.switching import adapters_of, owner_of
from lavis_aurora.common.errors import AuroraError, abbreviated
from lavis_aurora.common.files import new_folder, tensor_format

# LAVIS's names and Hugging Face's; all others (texts, projections, heads) are the same. {} is the number of a block.
NAMES = {
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "visual_encoder.blocks.{}.norm1": "vision_model.encoder.layers.{}.layer_norm1",
    "visual_encoder.blocks.{}.attn.qkv": "vision_model.encoder.layers.{}.self_attn.qkv",
    "visual_encoder.blocks.{}.attn.proj": "vision_model.encoder.layers.{}.self_attn.projection",
    "visual_encoder.blocks.{}.norm2": "vision_model.encoder.layers.{}.layer_norm2",
    "visual_encoder.blocks.{}.mlp.fc1": "vision_model.encoder.layers.{}.mlp.fc1",
    "visual_encoder.blocks.{}.mlp.fc2": "vision_model.encoder.layers.{}.mlp.fc2",
    "visual_encoder.norm": "vision_model.post_layernorm",
}
# Of these, what is added to the stream of features that the blocks pass on.
ADDED = ("cls_token", "pos_embed", "patch_embed.proj", "blocks.{}.attn.proj", "blocks.{}.mlp.fc2")
# By LAVIS's model. The first that fits is taken.
CLASSES: dict[type[Any], str] = {
    BlipRetrieval: "BlipForImageTextRetrieval",
    BlipITM: "BlipForImageTextRetrieval",
    BlipVQA: "BlipForQuestionAnswering",
    BlipCaption: "BlipForConditionalGeneration",
}
# Settings of a text tower that both have.
TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("max_position_embeddings", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob"),
)
# Normalisation of LAVIS's processors where their YAML gives none.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# In config.json and in the file of the weights: what ADDED was multiplied with, see residual_scale.
SCALE = "residual_scale"


def is_hugging_face(state: Mapping[str, Tensor]) -> bool:
    """Whether weights have Hugging Face's names of a BLIP."""
    return any(name.startswith("vision_model.embeddings.") for name in state)


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights under other names: of what ``names`` maps, a row for a module or parameter."""
    result = {}
    for name, value in state.items():
        number = next(iter(re.findall(r"(?<=\.)\d+(?=\.)", name)), "")
        form = name.replace(f".{number}.", ".{}.", 1) if number else name
        stem, dot, kind = form.rpartition(".")
        other = names.get(form) or (f"{names[stem]}{dot}{kind}" if stem in names else form)
        result[other.replace("{}", number)] = value
    return result


def to_hugging_face(state: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """LAVIS's weights in Hugging Face's names, what is :data:`ADDED` multiplied with ``scale``."""
    return renamed(_scaled(state, scale), NAMES)


def from_hugging_face(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], scale: float = 1.0
) -> dict[str, Tensor]:
    """Hugging Face's weights in LAVIS's names.

    Args:
        state: as read.
        own: of the model that takes them. ``temp``, which Hugging Face's models do not have, stays as it is there.
        scale: what :func:`to_hugging_face` was given.

    Raises:
        AuroraError: input and output embeddings differ.
    """
    found = _scaled(renamed(state, {theirs: ours for ours, theirs in NAMES.items()}), 1 / scale)
    head = "text_decoder.cls.predictions"
    # One tensor under two names, of which newer versions write one.
    for name, twin in (
        (f"{head}.decoder.bias", f"{head}.bias"),
        (f"{head}.decoder.weight", "text_decoder.bert.embeddings.word_embeddings.weight"),
    ):
        if name in own and twin in found and not torch.equal(found.setdefault(name, found[twin]), found[twin]):
            raise AuroraError(f"{name} and {twin} differ, which are one weight in LAVIS; it cannot have this model")
    if "temp" in own:
        found.setdefault("temp", own["temp"])
    return found


def _scaled(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    if scale == 1:
        return dict(state)
    added = "|".join(re.escape(f"visual_encoder.{name}").replace(r"\{\}", r"\d+") for name in ADDED)
    return {
        name: (value.double() * scale).to(value.dtype)
        if re.fullmatch(rf"({added})(\.weight|\.bias)?", name)
        else value
        for name, value in state.items()
    }


def residual_scale(path: str | Path) -> float:
    """What the weights in a file were multiplied with; 1 for those that :func:`export_transformers` did not write.

    LAVIS's vision tower adds 1e-6 to a variance, transformers' 1e-5 (4.26 whatever its configuration says). With
    everything that is :data:`ADDED` times c = sqrt(1e-5 / 1e-6), (c x - c m) / sqrt(c^2 v + 1e-5) is
    (x - m) / sqrt(v + 1e-6): the same numbers. c stands in the file and, if transformers has written that anew, in
    the config.json beside it.
    """
    said: Any = None
    if tensor_format(path) == "safetensors":
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get(SCALE)
    beside = Path(path).with_name("config.json")
    if said is None and beside.is_file():
        with suppress(ValueError, OSError, AttributeError):
            said = json.loads(beside.read_text(encoding="utf-8")).get("vision_config", {}).get(SCALE)
    try:
        scale = float(1 if said is None else said)
    except (TypeError, ValueError):
        scale = math.nan
    if not 1e-3 < scale < 1e3:
        raise AuroraError(f"{path}: {SCALE} {said!r} cannot be used; export the model again")
    return scale


def export_transformers(model: nn.Module, folder: str | Path) -> str:
    """Write a tuned model, the adapter merged, as a folder for ``from_pretrained`` of transformers.

    ``model.safetensors``, ``config.json``, and processor and tokenizer for ``BlipProcessor``. Weights are in single
    precision. Momentum copies, queues and ``temp`` are left out.

    Args:
        model: a BLIP for retrieval, questions or captions with an adapter, of this package or LAVIS's own in
            ``mode_approx``.
        folder: made; nothing may be there yet.

    Returns:
        The name of the class that loads it.

    Raises:
        AuroraError: transformers has no such model, the adapter cannot be merged (see :func:`merged_state_dict`), or
            the folder cannot be written.
    """
    plain, _ = plain_model(model, adapters_of(model))
    name = next((found for cls, found in CLASSES.items() if isinstance(plain, cls)), None)
    if name is None:
        raise AuroraError(
            f"transformers has no class for {type(plain).__name__}; it has those of LAVIS's blip_retrieval, "
            f"blip_image_text_matching, blip_vqa and blip_caption"
        )
    state = {key: value.float() for key, value in merged_state_dict(model).items() if value.is_floating_point()}
    config, scale = _configuration(plain, name)
    with torch.random.fork_rng():  # of its random weights none stays
        exported = getattr(transformers, name)(config)
    named, own = to_hugging_face(state, scale), exported.state_dict()
    buffers = {key for key, value in own.items() if not value.is_floating_point()}
    problems = [key for key in own.keys() - buffers if key not in named or named[key].shape != own[key].shape]
    if problems:
        raise AuroraError(f"{name} of transformers has weights that the model lacks: {abbreviated(sorted(problems))}")
    # Copies: input and output embeddings are one tensor, and safetensors takes no tensor twice.
    weights = {key: named.get(key, value).detach().cpu().clone() for key, value in own.items()}
    with new_folder(folder) as place:
        try:
            save_file(weights, place / "model.safetensors", {"format": "pt", SCALE: repr(scale)})
        except SafetensorError as error:
            raise AuroraError(f"cannot write {folder} ({error}); free some space or name another folder") from error
        config.save_pretrained(place)
        blip_processor(model, plain, config.vision_config.image_size, place).save_pretrained(place)
    return name


def _configuration(plain: Any, name: str) -> tuple[Any, float]:
    """transformers' configuration of LAVIS's towers, and the scale of its vision tower's weights."""
    vision = plain.visual_encoder
    towers = [getattr(plain, tower) for tower in ("text_encoder", "text_decoder") if hasattr(plain, tower)]
    texts = [{key: getattr(tower.config, key) for key in TEXT_KEYS} for tower in towers]
    for tower, text in zip(towers, texts):
        if text != texts[0] or tower.config.add_type_embeddings or tower.config.position_embedding_type != "absolute":
            raise AuroraError(
                "transformers' BLIP has one configuration for its text towers, without types of tokens and with "
                "absolute positions; this model's towers differ from that"
            )
    tokens = {f"{kind}_token_id": getattr(plain.tokenizer, f"{kind}_token_id") for kind in ("bos", "sep", "pad")}
    first = vision.blocks[0]
    eps = transformers.BlipVisionConfig().layer_norm_eps
    scale = math.sqrt(eps / vision.norm.eps)
    config = transformers.BlipConfig(
        text_config={**texts[0], **tokens, "eos_token_id": tokens["sep_token_id"]},
        vision_config={
            "hidden_size": vision.embed_dim,
            "intermediate_size": first.mlp.fc1.out_features,
            "num_hidden_layers": len(vision.blocks),
            "num_attention_heads": first.attn.num_heads,
            "image_size": vision.patch_embed.img_size[0],
            "patch_size": vision.patch_embed.patch_size[0],
            "layer_norm_eps": eps,
            SCALE: scale,
        },
        # The captioner has none.
        image_text_hidden_size=plain.text_proj.out_features if hasattr(plain, "text_proj") else 256,
        architectures=[name],
    )
    return config, scale


def blip_processor(model: nn.Module, plain: Any, side: int, folder: Path) -> Any:
    """Pictures of ``side`` pixels, and texts, as LAVIS's eval processors and tokenizer make them: a BlipProcessor.

    The tokenizer begins questions with [ENC], as LAVIS's model does by itself. Captions begin with [CLS] for ITC and
    with [ENC] for ITM.
    """
    preprocess = owner_of(model).describe_adapter().get("preprocess") or {}
    settings = (preprocess.get("vis_processor") or {}).get("eval") or {}
    images = transformers.BlipImageProcessor(
        size={"height": side, "width": side},
        image_mean=list(settings.get("mean") or MEAN),
        image_std=list(settings.get("std") or STD),
    )
    # A new one: LAVIS's remembers where on this machine it was read.
    [vocabulary] = plain.tokenizer.save_vocabulary(str(folder))
    lower = getattr(plain.tokenizer, "do_lower_case", True)
    tokenizer = BertTokenizer(vocabulary, do_lower_case=lower, model_max_length=plain.max_txt_len)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    if tokenizer.get_vocab() != plain.tokenizer.get_vocab():
        raise AuroraError("the tokenizer holds more than a vocabulary, [DEC] and [ENC]; it cannot be written")
    if isinstance(plain, BlipVQA):
        tokenizer.cls_token = "[ENC]"
    return transformers.BlipProcessor(images, tokenizer)
