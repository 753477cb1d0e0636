"""Models of transformers and OpenCLIP with a preset, built small by their own constructors with random weights.

What the installed library does not have is skipped. Runs where LAVIS is not installed, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

# Towers differ in width, where the model allows it, so that a factor of the one cannot pass for one of the other.
VISION, TEXT, PIXELS, WORDS, VOCABULARY = 24, 32, 16, 6, 50
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}  # of transformers, of either tower


class Outside(NamedTuple):
    """How one is built, and what it computes of pictures (3, 3, side, side) and tokens (3, WORDS)."""

    build: Callable[[], nn.Module]
    output: Callable[[nn.Module, Tensor, Tensor], Tensor]
    side: int = PIXELS


def hf(name: str) -> Any:
    """A class of transformers, or a skipped test."""
    transformers = pytest.importorskip("transformers")
    try:
        return getattr(transformers, name)
    except AttributeError:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")


def hf_text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": TEXT, "intermediate_size": 2 * TEXT, "max_position_embeddings": 16,
        **LAYERS, **more,
    }  # fmt: skip


def hf_vision(width: int = VISION) -> dict[str, Any]:
    return {"hidden_size": width, "intermediate_size": 2 * width, "image_size": PIXELS, "patch_size": 8, **LAYERS}


def hf_pair(name: str, width: int = VISION) -> Callable[[], nn.Module]:
    """CLIP and SigLIP."""
    return lambda: hf(f"{name}Model")(hf(f"{name}Config")(vision_config=hf_vision(width), text_config=hf_text()))


def hf_blip(name: str, width: int = VISION) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        text = hf_text(
            encoder_hidden_size=width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            bos_token_id=1, eos_token_id=2, sep_token_id=2, pad_token_id=0,
        )  # fmt: skip
        config = hf("BlipConfig")(vision_config=hf_vision(width), text_config=text, image_text_hidden_size=8)
        return hf(name)(config)

    return build


def hf_bert(name: str) -> Callable[[], nn.Module]:
    undropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return lambda: hf(name)(hf("BertConfig")(**hf_text(**undropped)))


def hf_vit(name: str) -> Callable[[], nn.Module]:
    return lambda: hf(name)(hf("ViTConfig")(**hf_vision()))


def both(one: Tensor, two: Tensor) -> Tensor:
    return torch.cat([one.flatten(), two.flatten()])


def contrastive(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    out = model(input_ids=tokens, pixel_values=images)
    return both(out.image_embeds, out.text_embeds)


def blip_features(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """Cross-attention takes no part in the features of CLIP's kind."""
    seen = model.vision_model(images)[0]
    return both(contrastive(model, images, tokens), model.text_model(tokens, encoder_hidden_states=seen)[0])


def blip_answers(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, pixel_values=images, decoder_input_ids=tokens, labels=tokens).loss


def blip_caption(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, pixel_values=images, labels=tokens).loss


def blip_matching(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, pixel_values=images, use_itm_head=True)[0]


CLIP_TEXT = {"context_length": WORDS, "vocab_size": VOCABULARY, "width": TEXT, "heads": 4, "layers": 2}
CLIP_VIT = {"layers": 2, "width": VISION, "head_width": 6, "patch_size": 8, "image_size": PIXELS}
CLIP_RESNET = {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32}
COCA = {
    "embed_dim": TEXT,
    "vision_cfg": {**CLIP_VIT, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
    "text_cfg": {**CLIP_TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": CLIP_TEXT,
}


def open_clip(name: str = "CLIP", **changes: Any) -> Callable[[], nn.Module]:
    settings = {"embed_dim": 16, "vision_cfg": CLIP_VIT, "text_cfg": CLIP_TEXT, **changes}
    return lambda: getattr(pytest.importorskip("open_clip"), name)(**settings)


def open_clip_timm() -> nn.Module:
    """The towers of OpenCLIP's SigLIP: one of timm, which pools by an attention, and one of its own."""
    timm, library = pytest.importorskip("timm"), pytest.importorskip("open_clip")
    if int(timm.__version__.partition(".")[0]) < 1:
        pytest.skip(f"timm {timm.__version__} has no towers for OpenCLIP's SigLIP")
    vision = {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 32}
    return library.CustomTextCLIP(embed_dim=64, vision_cfg=vision, text_cfg=CLIP_TEXT, init_logit_bias=-10)


def coca() -> nn.Module:
    model = open_clip("CoCa", **COCA)()
    nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # OpenCLIP leaves it as the memory was
    return model


def clip_features(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    return both(model.encode_image(images), model.encode_text(tokens))


def coca_logits(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    out = model(images, tokens)
    return torch.cat([out["logits"].flatten(), both(out["image_features"], out["text_features"])])


# By the preset's name; further ones of the same preset after a slash.
MODELS: dict[str, Outside] = {
    "hf_bert": Outside(hf_bert("BertModel"), lambda model, _, tokens: model(tokens).last_hidden_state),
    "hf_bert/classification": Outside(
        hf_bert("BertForSequenceClassification"), lambda model, _, tokens: model(tokens).logits
    ),
    "hf_blip": Outside(hf_blip("BlipModel"), blip_features),
    "hf_blip/retrieval": Outside(hf_blip("BlipForImageTextRetrieval"), blip_matching),
    "hf_blip/vqa": Outside(hf_blip("BlipForQuestionAnswering", TEXT), blip_answers),
    "hf_blip/caption": Outside(hf_blip("BlipForConditionalGeneration"), blip_caption),
    "hf_clip": Outside(hf_pair("CLIP"), contrastive),
    "hf_siglip": Outside(hf_pair("Siglip", TEXT), contrastive),
    "hf_vit": Outside(hf_vit("ViTModel"), lambda model, images, _: model(images).last_hidden_state),
    "hf_vit/classification": Outside(
        hf_vit("ViTForImageClassification"), lambda model, images, _: model(images).logits
    ),
    "open_clip": Outside(open_clip(), clip_features),
    "open_clip/resnet": Outside(open_clip(vision_cfg=CLIP_RESNET), clip_features, 32),
    "open_clip/custom_text": Outside(open_clip("CustomTextCLIP"), clip_features),
    "open_clip/coca": Outside(coca, coca_logits),
    "open_clip/timm": Outside(open_clip_timm, clip_features, 32),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The small model, the same for the same seed, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name].build().eval()


def output(name: str, model: nn.Module, seed: int = 0) -> Tensor:
    """What :func:`build`'s model computes of a batch of three that is drawn from the seed."""
    generator, side = torch.Generator().manual_seed(seed), MODELS[name].side
    images = torch.randn(3, 3, side, side, generator=generator)
    tokens = torch.randint(3, VOCABULARY, (3, WORDS), generator=generator)
    return MODELS[name].output(model, images, tokens)
