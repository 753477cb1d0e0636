"""Which layers are adapted, by the registered name of a LAVIS model: the attention projections of its towers.

Each entry is a list of regular expressions over layer names. Momentum copies follow the layers that they are copies
of and are named nowhere. Left out are the models that cannot be tuned so:

- ``pnp_vqa``, ``img2prompt_vqa``: pipelines of finished models without a training loss; tune their parts,
  ``blip_image_text_matching`` and ``blip_caption``.
- ``pnp_unifiedqav2_fid``: the language model of ``pnp_vqa`` alone, without a picture.
- ``gpt_dialogue``: GPT-2 holds its projections in ``Conv1D``, which is no nn.Linear.
"""

from __future__ import annotations

from collections.abc import Sequence

# Attention projections by their usual names, in any model. Layers of other names need a pattern of their own.
ATTENTION = (r"(.*\.)?(query|key|value|qkv|[qkv]_proj|attn|self_attn|multihead_attn)",)

VIT = r"visual_encoder\.blocks\.\d+\.attn\.qkv"
TIMESFORMER = r"visual_encoder\.model\.blocks\.\d+\.(attn|temporal_attn)\.qkv"
QFORMER = (
    r"Qformer\.bert\.encoder\.layer\.\d+\.attention\.self\.(query|key|value)",
    r"Qformer\.bert\.encoder\.layer\.\d+\.crossattention\.self\.(query|key|value)",
)
# The image tower of CLIP is a transformer, or a ResNet with attention pooling.
CLIP = (
    r"visual\.(transformer\.resblocks\.\d+\.attn|attnpool\.[qkv]_proj)",
    r"transformer\.resblocks\.\d+\.attn",
)


def _bert(tower: str, cross: str = "crossattention") -> tuple[str, ...]:
    """Self- and cross-attention of LAVIS's BERT under ``tower``; NLVR's cross-attention holds one part an image."""
    layers = rf"{tower}\.(bert\.)?encoder\.layer\.\d+"
    projections = (rf"{layers}\.attention\.self\.(query|key|value)",)
    return projections + ((rf"{layers}\.{cross}\.self\d?\.(query|key|value)",) if cross else ())


TEXT, DECODER = _bert("text_encoder"), _bert("text_decoder")

PRESETS: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "albef_classification": (VIT, *TEXT),
    "albef_feature_extractor": (VIT, *TEXT),
    "albef_nlvr": (VIT, *TEXT),
    "albef_pretrain": (VIT, *TEXT),
    "albef_retrieval": (VIT, *TEXT),
    "albef_vqa": (VIT, *TEXT, *DECODER),
    "alpro_qa": (TIMESFORMER, *_bert("text_encoder", cross="")),
    "alpro_retrieval": (TIMESFORMER, *_bert("text_encoder", cross="")),
    "blip2": QFORMER,
    "blip2_feature_extractor": QFORMER,
    "blip2_image_text_matching": QFORMER,
    "blip2_opt": QFORMER,
    "blip2_t5": QFORMER,
    "blip_caption": (VIT, *DECODER),
    "blip_classification": (VIT, *TEXT),
    "blip_feature_extractor": (VIT, *TEXT),
    "blip_image_text_matching": (VIT, *TEXT),
    "blip_nlvr": (VIT, *TEXT),
    "blip_pretrain": (VIT, *TEXT, *DECODER),
    "blip_retrieval": (VIT, *TEXT),
    "blip_retrieval_aurora": (VIT, *TEXT),
    "blip_vqa": (VIT, *TEXT, *DECODER),
    "blip_vqa_aurora": (VIT, *TEXT, *DECODER),
    "clip": CLIP,
    "clip_feature_extractor": CLIP,
}


def expand_presets(targets: Sequence[str]) -> list[str]:
    """The regular expressions of ``targets``, in which an entry may be the name of a preset."""
    return [pattern for entry in targets for pattern in PRESETS.get(entry, (entry,))]
