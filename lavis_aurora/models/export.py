"""A tuned model for other programs: plain LAVIS, peft, transformers, ONNX; what the commands merge and export do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import nn

from lavis_aurora.adapters.arithmetic import BACKBONE_SETTINGS
from lavis_aurora.adapters.card import CARD, model_card
from lavis_aurora.adapters.config import AdapterConfig, read_adapter_config
from lavis_aurora.adapters.export import export_lora
from lavis_aurora.adapters.merging import merged_state_dict
from lavis_aurora.common.errors import AuroraError, did_you_mean
from lavis_aurora.common.files import atomic_write, write_text
from lavis_aurora.config.adapter_settings import type_settings
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.models import BlipAuroraConfig, ModeApproxModelConfig
from lavis_aurora.models.hugging_face import export_transformers
from lavis_aurora.models.loading import SOURCES, load_model_and_preprocess
from lavis_aurora.models.onnx import check_onnx, export_onnx


def merge(
    adapter: str,
    output: str,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    med_config_path: str | None = None,
) -> str:
    """Write a checkpoint that LAVIS's own model loads; what to do with it, as text.

    Args:
        adapter: a folder.
        output: the file to write.
        pretrained, tokenizer, med_config_path: as of :func:`load_model_and_preprocess`.

    Raises:
        AuroraError: the file is there already, the adapter has gates, or backbone and adapter do not fit.
    """
    place = Path(output).expanduser()
    if place.exists():
        raise AuroraError(f"{place} is there already; name another file")
    model, config = _tuned_model(adapter, "merged_state_dict(model)", pretrained, tokenizer, med_config_path)
    state = merged_state_dict(model)
    with atomic_write(place) as file:
        torch.save({"model": state}, file)
    said = loading_instructions(config.model["arch"], model.settings, place.absolute())
    return f"{place}: {len(state)} tensors; {said}"


def _tuned_model(adapter: str, in_python: str, *sources: str | None) -> tuple[Any, AdapterConfig]:
    """The model that an adapter is of, with it, in eval mode, and what the adapter says of itself."""
    config = read_adapter_config(adapter)
    arch = config.model.get("arch")
    if arch is None:
        raise AuroraError(f"{adapter} does not name its model; use {in_python} in Python")
    load: Any = partial(load_model_and_preprocess, arch, is_eval=True, adapter=adapter)
    model, _, _ = load(**dict(zip(SOURCES, sources)))
    return model, config


def export(
    adapter: str,
    to: str,
    output: str,
    rank: int | None = None,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    med_config_path: str | None = None,
) -> str:
    """Write a tuned model as another library loads it, with a model card; what was written, as text.

    Args:
        adapter: a folder.
        to: one of :data:`EXPORTS`.
        output: the folder to write.
        rank: of peft's LoRA, if it shall be cut.
        pretrained, tokenizer, med_config_path: as of :func:`load_model_and_preprocess`.

    Raises:
        AuroraError: there is no such format, something is at ``output`` already, backbone and adapter do not fit, or
            the library cannot have the model.
    """
    if to not in EXPORTS:
        raise AuroraError(f"--to: unknown format {to!r}{did_you_mean(to, EXPORTS)}")
    if rank is not None and to != "peft":
        raise AuroraError("--rank: is of peft's LoRA; leave it out")
    if to == "onnx":
        check_onnx()
    place = Path(output).expanduser()
    if place.exists():
        raise AuroraError(f"{place} is there already; name another folder")
    sources = (pretrained, tokenizer, med_config_path)
    model, config = _tuned_model(adapter, f"{EXPORTS[to].__name__}(model, folder)", *sources)
    if to == "peft":
        named = [key for key, source in zip(SOURCES, sources) if source is not None]
        usage, notes = _to_peft(model, config, place, rank, named)
    elif to == "onnx":
        usage, notes = _to_onnx(model, place)
    else:
        usage, notes = _to_transformers(model, place)
    # A card is shared: it does not say where this machine has the folder.
    said = [*notes, *(_merging_notes(config) if to == "transformers" else [])]  # whoever exports has it in the log
    card = model_card(config, to, usage.replace("FOLDER", repr(place.absolute().name)), adapter, said)
    write_text(place / CARD, card)
    code = usage.replace("FOLDER", repr(str(place))).strip().splitlines()
    return "\n".join([f"{place}: loaded by", *(f"    {line}".rstrip() for line in code), *notes])


# Formats of the command, and what writes them in Python.
EXPORTS: dict[str, Callable[..., Any]] = {
    "peft": export_lora,
    "transformers": export_transformers,
    "onnx": export_onnx,
}
# The model is whichever has the backbone's weights.
PEFT_USAGE = """
from lavis_aurora import load_model_and_preprocess
from peft import PeftModel

backbone, vis, txt = load_model_and_preprocess({arguments}, is_eval=True)  # or LAVIS's own with the same weights
model = PeftModel.from_pretrained(backbone, FOLDER).eval()
"""
RETRIEVAL_USAGE = """
import torch
from transformers import BlipForImageTextRetrieval, BlipProcessor

processor = BlipProcessor.from_pretrained(FOLDER)
model = BlipForImageTextRetrieval.from_pretrained(FOLDER).eval()
inputs = processor(image, "a red circle", truncation=True, return_tensors="pt")  # image: of PIL
with torch.no_grad():
    itc = model(**inputs, use_itm_head=False).itm_score  # cosine similarity
    inputs["input_ids"][:, 0] = processor.tokenizer.convert_tokens_to_ids("[ENC]")  # as LAVIS does for ITM
    itm = model(**inputs).itm_score.softmax(dim=1)[:, 1]  # probability of a match
"""
VQA_USAGE = """
from transformers import BlipForQuestionAnswering, BlipProcessor

processor = BlipProcessor.from_pretrained(FOLDER)
model = BlipForQuestionAnswering.from_pretrained(FOLDER).eval()
inputs = processor(image, "what color is the circle", truncation=True, return_tensors="pt")  # image: of PIL
answer = processor.decode(model.generate(**inputs, max_length=10)[0], skip_special_tokens=True)
"""
CAPTION_USAGE = """
from transformers import BlipForConditionalGeneration, BlipProcessor

processor = BlipProcessor.from_pretrained(FOLDER)
model = BlipForConditionalGeneration.from_pretrained(FOLDER).eval()
inputs = processor(image, {prompt!r}, return_tensors="pt")  # image: of PIL
caption = processor.decode(model.generate(**inputs, max_length=30)[0], skip_special_tokens=True)
"""
ONNX_USAGE = """
from onnxruntime import InferenceSession
from transformers import BlipProcessor

processor = BlipProcessor.from_pretrained(FOLDER)
image_tower, text_tower, matching = (
    InferenceSession(FOLDER + "/" + name) for name in ("image_tower.onnx", "text_tower.onnx", "matching.onnx")
)
inputs = dict(processor(image, "a red circle", truncation=True, return_tensors="np"))  # image: of PIL
feature, tokens = image_tower.run(None, {"pixel_values": inputs.pop("pixel_values")})
[words] = text_tower.run(None, inputs)
itc = feature @ words.T  # cosine similarity
[itm] = matching.run(None, {"tokens": tokens, **inputs})  # probability of a match
"""
USAGES = {
    "BlipForImageTextRetrieval": RETRIEVAL_USAGE,
    "BlipForQuestionAnswering": VQA_USAGE,
    "BlipForConditionalGeneration": CAPTION_USAGE,
}


def _to_peft(
    model: nn.Module, config: AdapterConfig, output: Path, rank: int | None, named: Sequence[str]
) -> tuple[str, list[str]]:
    """Usage of ``FOLDER``, and notes; ``named`` are those of :data:`SOURCES` that are not the type's."""
    written = export_lora(model, output, rank=rank)
    arch, model_type = config.model["arch"], config.model.get("model_type")
    settings = config.model.get("settings") or {}
    if base := settings.get("base"):
        arch, model_type, settings = base["arch"], base.get("model_type"), base
    arguments = ", ".join([*(repr(word) for word in (arch, model_type) if word), *(f"{key}=..." for key in named)])
    usual = type_settings(registry.get_model_class(arch), model_type)
    others = {key: settings[key] for key in BACKBONE_SETTINGS if key in settings and settings[key] != usual.get(key)}
    notes = [f"LoRA of rank {written.rank} in {len(written.layers)} layers."]
    if written.error:
        notes.append(f"Cut to this rank: || dW - B A || / || dW || = {written.error:.2g}.")
    if named:
        notes.append(f"The backbone is not that of the type: name the {', '.join(named)} that it was tuned with.")
    if others:
        words = ", ".join(f"{key} {value}" for key, value in others.items())
        notes.append(f"The backbone is to be built as it was tuned, by a YAML or in Python: {words}.")
    if written.heads:
        notes.append(f"With the heads that were trained: {', '.join(written.heads)}.")
    if written.left_out:
        notes.append(f"Without {', '.join(written.left_out)}, for which peft has no place.")
    if written.attentions:
        notes.append(f"{len(written.attentions)} of them are nn.MultiheadAttention, which peft adapts from 0.15 on.")
    if written.shared:
        notes.append(
            f"{len(written.shared)} layers share weights: peft's merge_and_unload would add their updates twice, so "
            f"use lavis-aurora merge for that."
        )
    return PEFT_USAGE.format(arguments=arguments), notes


def _to_transformers(model: nn.Module, output: Path) -> tuple[str, list[str]]:
    """Usage of ``FOLDER``, and notes."""
    name = export_transformers(model, output)
    prompt = getattr(model, "prompt", None) or ""
    usage = USAGES[name].replace("{prompt!r}", repr(prompt.strip() or None))
    notes = [
        "Prepare texts as LAVIS's processors do: lower case, without .!\"()*#:;~",
        "The vision tower's weights are scaled: with transformers' epsilon of layer norm they give LAVIS's numbers.",
    ]
    if getattr(model, "mask_question_padding", False):
        notes.append(
            "Padding of questions was masked in answering, which generate of transformers does not: one at a time."
        )
    return usage, notes


def _to_onnx(model: nn.Module, output: Path) -> tuple[str, list[str]]:
    """Usage of ``FOLDER``, and notes."""
    names = export_onnx(model, output)
    sizes = (f"{name} {sum(file.stat().st_size for file in output.glob(f'{name}*')) / 1e6:.0f} MB" for name in names)
    notes = [
        f"{', '.join(sizes)}, in single precision.",
        "Texts are to be as LAVIS's processors make them: lower case, without .!\"()*#:;~",
        "Of a video, give matching the tokens of its frames one after the other; no file has its ITC feature: "
        "averaged features of frames are not that.",
    ]
    return ONNX_USAGE, notes


def _merging_notes(config: AdapterConfig) -> list[str]:
    """What no other program does as the tuned model does, for the card; the log says it when weights are merged."""
    settings = config.model.get("settings") or {}
    merging = (settings.get("base") or settings).get("token_merging")
    if not merging:
        return []
    return [f"It was tuned with token_merging {merging}; with all tokens, as here, scores differ: evaluate it."]


# The types of LAVIS that stand in for those which only this package has.
PLAIN_TYPES = {"blip_retrieval": "coco", "blip_vqa": "vqav2"}
# What LAVIS's BLIP reads of its YAML that decides shapes or scores.
BLIP_KEYS = (
    *("image_size", "vit_type", "vit_layer_norm_epsilon", "med_config_path"),
    *("embed_dim", "queue_size", "max_txt_len"),
)
# What of a section says where weights come from.
LOADING_KEYS = ("arch", "model_type", "load_finetuned", "finetuned", "pretrained")


def loading_instructions(arch: str, settings: BlipAuroraConfig | ModeApproxModelConfig, file: Path) -> str:
    """The ``model:`` section with which LAVIS loads a merged checkpoint, or why none does, as text.

    Args:
        arch: registered name of the model that was merged.
        settings: what it was built from.
        file: the checkpoint.
    """
    if isinstance(settings, ModeApproxModelConfig):
        arch, base = settings.base["arch"], settings.base
        inside = getattr(registry.get_model_class(arch), "CONFIG_CLASS", None)
        if inside is None:
            own = {key: value for key, value in base.items() if key not in LOADING_KEYS}
            return _section(arch, base.get("model_type"), own, {}, file)
        blip: BlipAuroraConfig = parse_config(inside, base, "model.base")
    else:
        blip = settings
    arch = arch.removesuffix("_aurora")
    if blip.vit is not None:
        sizes = ", ".join(f"{key} {value}" for key, value in vars(blip.vit).items())
        return (
            f"no YAML of plain LAVIS loads it: LAVIS builds its ViT base and its ViT large only, and this one has "
            f"{sizes}; in Python, give LAVIS's {arch} such towers (docs/adapters.md, Merging)"
        )
    own = {key: getattr(blip, key) for key in BLIP_KEYS if hasattr(blip, key)}
    # What LAVIS takes where its YAML says nothing is what this package does.
    unsaid = {key: getattr(type(blip)(), key) for key in own}
    return _section(arch, blip.model_type, own, unsaid, file)


def _section(arch: str, model_type: str | None, own: Mapping[str, Any], unsaid: Mapping[str, Any], file: Path) -> str:
    """What ``own`` changes of LAVIS's defaults for the type, which are ``unsaid`` where its YAML has none."""
    plain = registry.get_model_class(arch)
    if model_type not in plain.PRETRAINED_MODEL_CONFIG_DICT:
        model_type = PLAIN_TYPES[arch]
    written: Any = OmegaConf.to_container(OmegaConf.load(plain.default_config_path(model_type)).model)
    defaults = {**unsaid, **written}
    if "load_finetuned" not in defaults:
        return f"LAVIS's {arch} reads no checkpoint from a YAML; in Python, model.load_checkpoint({str(file)!r}) does"
    model = {"arch": arch, "model_type": model_type, "load_finetuned": True, "finetuned": str(file)}
    model.update({k: v for k, v in own.items() if k == "image_size" or k not in defaults or defaults[k] != v})
    same = ", and processors of the same image_size" if "image_size" in model else ""
    section = OmegaConf.to_yaml({"model": model}).rstrip()
    return f"LAVIS's {arch} loads it, in a YAML by these keys{same}:\n{section}"
