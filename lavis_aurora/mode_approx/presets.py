"""Which layers are adapted: words for kinds of linear layers, and the towers of models by name.

Models of LAVIS have the names that they are registered by, those of transformers ``hf_`` and their ``model_type``.

A preset is a list of regular expressions over layer names. Momentum copies follow the layers that they are copies of
and are named nowhere. Left out are the models that cannot be tuned so:

- ``pnp_vqa``, ``img2prompt_vqa``: pipelines of finished models without a training loss; tune their parts,
  ``blip_image_text_matching`` and ``blip_caption``.
- ``pnp_unifiedqav2_fid``: the language model of ``pnp_vqa`` alone, without a picture.
- ``gpt_dialogue``: GPT-2 holds its projections in ``Conv1D``, which is no nn.Linear.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Linear layers of a transformer, and its nn.MultiheadAttention, by their usual names. Layers of other names need a
# pattern of their own.
LAYERS = {
    # Query, key and value. SigLIP pools by one attention more, nn.MultiheadAttention or (in timm) two layers.
    "attention": r"query|key|value|qkv|[qkv]_proj|attn|self_attn|multihead_attn|head\.attention|attn_pool\.(q|kv)",
    # What follows an attention. NLVR has one for each image and, in upper layers, one that merges both.
    "attention_output": (
        r"(out|o)_proj|(temporal_)?attn\.proj|temporal_fc|attnpool\.c_proj|attn_pool\.proj|self_attn\.projection"
        r"|(cross)?attention\.output\.(dense\d?|merge_layer)"
    ),
    # Both matrices; the Q-Former has a pair for queries.
    "feed_forward": r"fc[12]|linear[12]|mlp\.c_(fc|proj)|layer\.\d+\.(intermediate|output)(_query)?\.dense",
}
LAYERS["all_linear"] = "|".join(LAYERS.values())

VISION, TEXT, DECODER = "visual_encoder", "text_encoder", "text_decoder"
# In BLIP-2 the other towers are left as they are.
QFORMER = ("Qformer",)
# The image tower of CLIP is a transformer, or a ResNet with attention pooling, which has no feed-forward layers.
CLIP = ("visual|transformer",)
TOWERS: dict[str, tuple[str, ...]] = {
    "albef_classification": (VISION, TEXT),
    "albef_feature_extractor": (VISION, TEXT),
    "albef_nlvr": (VISION, TEXT),
    "albef_pretrain": (VISION, TEXT),
    "albef_retrieval": (VISION, TEXT),
    "albef_vqa": (VISION, TEXT, DECODER),
    "alpro_qa": (VISION, TEXT),
    "alpro_retrieval": (VISION, TEXT),
    "blip2": QFORMER,
    "blip2_feature_extractor": QFORMER,
    "blip2_image_text_matching": QFORMER,
    "blip2_opt": QFORMER,
    "blip2_t5": QFORMER,
    "blip_caption": (VISION, DECODER),
    "blip_classification": (VISION, TEXT),
    "blip_feature_extractor": (VISION, TEXT),
    "blip_image_text_matching": (VISION, TEXT),
    "blip_nlvr": (VISION, TEXT),
    "blip_pretrain": (VISION, TEXT, DECODER),
    "blip_retrieval": (VISION, TEXT),
    "blip_retrieval_aurora": (VISION, TEXT),
    "blip_vqa": (VISION, TEXT, DECODER),
    "blip_vqa_aurora": (VISION, TEXT, DECODER),
    "clip": CLIP,
    "clip_feature_extractor": CLIP,
}
# Models of other libraries. A tower without such layers is an error, so that none is left out unseen.
OTHERS: dict[str, tuple[str, ...]] = {
    "hf_bert": (r"(bert\.)?encoder",),
    "hf_blip": ("vision_model", "text_(model|encoder|decoder)"),
    "hf_clip": ("vision_model", "text_model"),
    "hf_siglip": ("vision_model", "text_model"),
    "hf_vit": (r"(vit\.)?encoder",),
    # The text tower of CLIP itself stands at the top; CoCa has a decoder besides.
    "open_clip": ("visual", "transformer|text|text_decoder"),
}

# What follows a tower in the patterns of a model's preset.
TOWER_END = r"\.(.*\.)?"
# WORD: such layers of any model. MODEL/WORD: those of the model's towers. MODEL: its attention, as in the paper.
PRESETS: dict[str, tuple[str, ...]] = {
    **{word: (rf"(.*\.)?({names})",) for word, names in LAYERS.items()},
    **{
        f"{model}/{word}": tuple(f"({tower}){TOWER_END}({names})" for tower in towers)
        for model, towers in {**TOWERS, **OTHERS}.items()
        for word, names in LAYERS.items()
    },
}
PRESETS.update({model: PRESETS[f"{model}/attention"] for model in (*TOWERS, *OTHERS)})
# Of BLIP, what the authors' released code adapts.
PRESETS["released"] = (
    rf"{VISION}\.(.*\.)?({LAYERS['all_linear']})",
    rf"({TEXT}|{DECODER})\.(.*\.)?({LAYERS['attention']})",
)
ATTENTION = PRESETS["attention"]


def expand_presets(targets: Sequence[str]) -> list[str]:
    """The regular expressions of ``targets``, in which an entry may be the name of a preset."""
    return [pattern for entry in targets for pattern in PRESETS.get(entry, (entry,))]


def is_attention(name: str) -> bool:
    """Whether a layer holds query, key or value, by its name."""
    return re.fullmatch(ATTENTION[0], name) is not None
