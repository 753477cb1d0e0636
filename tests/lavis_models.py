"""Every LAVIS model with a preset, built small by its own constructor with random weights, and a batch for it.

LAVIS's constructors read the tokenizer ``bert-base-uncased``; run them in :func:`hub_folder`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lavis.models import (
    AlbefClassification,
    AlbefFeatureExtractor,
    AlbefNLVR,
    AlbefPretrain,
    AlbefRetrieval,
    AlbefVQA,
    AlproQA,
    AlproRetrieval,
    Blip2ITM,
    Blip2OPT,
    Blip2Qformer,
    Blip2T5,
    BlipCaption,
    BlipClassification,
    BlipFeatureExtractor,
    BlipITM,
    BlipNLVR,
    BlipPretrain,
    BlipRetrieval,
    BlipVQA,
)
from lavis.models.blip2_models import Qformer
from lavis.models.blip2_models.blip2 import LayerNorm, disabled_train
from lavis.models.blip2_models.modeling_opt import OPTForCausalLM
from lavis.models.blip2_models.modeling_t5 import T5ForConditionalGeneration
from lavis.models.blip_models.nlvr_encoder import BertModel as NlvrBertModel
from lavis.models.clip_models.loss import ClipLoss
from lavis.models.clip_models.model import CLIP
from lavis.models.eva_vit import VisionTransformer as EvaTransformer
from lavis.models.med import BertForMaskedLM, BertModel, XBertEncoder, XBertLMHeadDecoder
from lavis.models.timesformer.vit import TimeSformer
from lavis.models.timesformer.vit import VisionTransformer as TimesformerTransformer
from lavis.models.vit import VisionTransformerEncoder
from torch import Tensor, nn
from transformers import BertConfig, BertTokenizer, OPTConfig, T5Config

from lavis_aurora.common.paths import package_file

# Towers differ in width, so that a factor of the one cannot pass for one of the other.
VISION, TEXT, PIXELS = 24, 32, 16
# Of one length: blip2_image_text_matching cannot pad.
WORDS = ["a red circle", "a blue square", "a green star"]


def hub_folder(folder: Path) -> Path:
    """A working directory in which ``bert-base-uncased`` is the tiny vocabulary."""
    target = folder / "bert-base-uncased"
    target.mkdir(parents=True)
    (target / "vocab.txt").write_text(Path(package_file("configs/models/tiny/vocab.txt")).read_text())
    return folder


def bert_config(**changes: Any) -> BertConfig:
    """A BERT of LAVIS's kind over the tiny vocabulary; without dropout, so that forwards can be compared."""
    size = len(BertTokenizer.from_pretrained("bert-base-uncased")) + 2
    settings = {
        "vocab_size": size,
        "hidden_size": TEXT,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * TEXT,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "encoder_width": VISION,
        "add_cross_attention": True,
        "add_type_embeddings": False,
    }
    return BertConfig(**{**settings, **changes})


def vit() -> VisionTransformerEncoder:
    encoder = VisionTransformerEncoder(img_size=PIXELS, patch_size=8, embed_dim=VISION, depth=2, num_heads=2)
    encoder.vision_width = VISION
    return encoder


def bert(**changes: Any) -> XBertEncoder:
    return XBertEncoder(config=bert_config(**changes), add_pooling_layer=False)


def decoder(**changes: Any) -> XBertLMHeadDecoder:
    return XBertLMHeadDecoder(config=bert_config(**changes))


class SmallTimeSformer(TimeSformer):
    """LAVIS's own is 768 wide and 12 deep, whatever it is told."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.img_size, self.patch_size, self.num_frames = PIXELS, 8, 2
        self.model = TimesformerTransformer(
            img_size=PIXELS, patch_size=8, embed_dim=VISION, depth=2, num_heads=2, qkv_bias=True, num_frames=2,
            num_classes=0, drop_path_rate=0.0,
        )  # fmt: skip
        for block in self.model.blocks:  # zero in LAVIS, which would hide the temporal attention
            nn.init.normal_(block.temporal_fc.weight, std=0.1)


class SmallBlip2:
    """In front of LAVIS's Blip2Base: towers that are not downloaded."""

    @classmethod
    def init_vision_encoder(cls, *_args, **_kwargs) -> tuple[nn.Module, nn.Module]:
        encoder = EvaTransformer(
            img_size=PIXELS,
            patch_size=8,
            embed_dim=VISION,
            depth=2,
            num_heads=2,
            qkv_bias=True,
            use_mean_pooling=False,
        )
        return encoder, LayerNorm(VISION)

    @classmethod
    def init_Qformer(cls, num_query_token: int, vision_width: int, cross_attention_freq: int = 2):
        config = bert_config(encoder_width=vision_width)
        config.cross_attention_freq, config.query_length = cross_attention_freq, num_query_token
        return Qformer.BertLMHeadModel(config=config), nn.Parameter(torch.randn(1, num_query_token, TEXT))

    def set_up_towers(self, language_model: nn.Module) -> None:
        """What the constructors of Blip2OPT and Blip2T5 set up alike."""
        nn.Module.__init__(self)
        self.tokenizer = self.init_tokenizer()
        self.visual_encoder, self.ln_vision = self.init_vision_encoder()
        self.visual_encoder.requires_grad_(False).eval().train = disabled_train
        self.Qformer, self.query_tokens = self.init_Qformer(3, VISION)
        self.Qformer.cls = self.Qformer.bert.embeddings.word_embeddings = None
        self.Qformer.bert.embeddings.position_embeddings = None
        for layer in self.Qformer.bert.encoder.layer:
            layer.output = layer.intermediate = None
        self.max_txt_len, self.prompt = 12, ""
        language_model.requires_grad_(False)


class SmallBlip2Qformer(SmallBlip2, Blip2Qformer):
    pass


class SmallBlip2ITM(SmallBlip2, Blip2ITM):
    pass


class SmallBlip2T5(SmallBlip2, Blip2T5):
    def __init__(self) -> None:
        size = bert_config().vocab_size
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=size, d_model=TEXT, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
            )
        )
        self.set_up_towers(model)
        self.t5_tokenizer, self.t5_model, self.t5_proj = self.tokenizer, model, nn.Linear(TEXT, TEXT)


class SmallBlip2OPT(SmallBlip2, Blip2OPT):
    def __init__(self) -> None:
        size = bert_config().vocab_size
        model = OPTForCausalLM(
            OPTConfig(vocab_size=size, hidden_size=TEXT, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2,
                      max_position_embeddings=64, word_embed_proj_dim=TEXT, dropout=0.0)
        )  # fmt: skip
        self.set_up_towers(model)
        self.opt_tokenizer, self.opt_model, self.opt_proj = self.tokenizer, model, nn.Linear(TEXT, TEXT)


CLIP_TEXT = {"width": TEXT, "heads": 2, "layers": 2, "context_length": 77, "vocab_size": 49408}


def clip(vision: dict[str, Any]) -> CLIP:
    model = CLIP(embed_dim=16, vision_cfg=vision, text_cfg=CLIP_TEXT)
    # Its own loss asks for several processes.
    model._loss = ClipLoss(rank=0, world_size=1)
    return model


CLIP_VIT = {"layers": 2, "width": 64, "patch_size": 8, "image_size": PIXELS}
CLIP_RESNET = {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32}
ALBEF_TEXT = {"num_hidden_layers": 3, "fusion_layer": 1}
QUEUE = {"queue_size": 6, "embed_dim": 16}

# By the preset's name; further ones of the same model after a slash.
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "albef_classification": lambda: AlbefClassification(vit(), bert(**ALBEF_TEXT), num_classes=3),
    "albef_feature_extractor": lambda: AlbefFeatureExtractor(vit(), bert(**ALBEF_TEXT), embed_dim=16),
    # Its layers share keys and values two by two from the seventh on.
    "albef_nlvr": lambda: AlbefNLVR(
        vit(),
        BertModel(config=bert_config(num_hidden_layers=18, fusion_layer=6), add_pooling_layer=False),
        num_classes=2,
    ),
    "albef_pretrain": lambda: AlbefPretrain(vit(), BertForMaskedLM(config=bert_config(**ALBEF_TEXT)), **QUEUE),
    "albef_retrieval": lambda: AlbefRetrieval(vit(), bert(**ALBEF_TEXT), **QUEUE),
    "albef_vqa": lambda: AlbefVQA(vit(), bert(**ALBEF_TEXT), decoder(encoder_width=TEXT, fusion_layer=0)),
    "alpro_qa": lambda: AlproQA(
        SmallTimeSformer(), bert(**alpro_text()), hidden_size=VISION, num_classes=3, max_txt_len=12
    ),
    "alpro_retrieval": lambda: AlproRetrieval(
        SmallTimeSformer(), bert(**alpro_text()), vision_width=VISION, text_width=VISION, embed_dim=16, max_txt_len=12
    ),
    "blip2": lambda: SmallBlip2Qformer(num_query_token=3, embed_dim=16, max_txt_len=12),
    "blip2_image_text_matching": lambda: SmallBlip2ITM(num_query_token=3, embed_dim=16, max_txt_len=12),
    "blip2_opt": SmallBlip2OPT,
    "blip2_t5": SmallBlip2T5,
    "blip_caption": lambda: BlipCaption(vit(), decoder(), prompt="a "),
    "blip_classification": lambda: BlipClassification(vit(), bert(), num_classes=3),
    "blip_feature_extractor": lambda: BlipFeatureExtractor(vit(), bert(), embed_dim=16),
    "blip_image_text_matching": lambda: BlipITM(vit(), bert(), embed_dim=16),
    "blip_nlvr": lambda: BlipNLVR(vit(), NlvrBertModel(config=bert_config(), add_pooling_layer=False), num_classes=2),
    "blip_pretrain": lambda: BlipPretrain(vit(), bert(), decoder(), **QUEUE),
    "blip_retrieval": lambda: BlipRetrieval(vit(), bert(), negative_all_rank=False, **QUEUE),
    "blip_vqa": lambda: BlipVQA(vit(), bert(), decoder(encoder_width=TEXT)),
    "clip": lambda: clip(CLIP_VIT),
    "clip/resnet": lambda: clip(CLIP_RESNET),
}


def alpro_text() -> dict[str, Any]:
    """ALPRO's frames enter the text tower as tokens; video and text are equally wide."""
    return {
        "hidden_size": VISION,
        "num_hidden_layers": 3,
        "fusion_layer": 1,
        "add_cross_attention": False,
        "add_type_embeddings": True,
    }


def build(name: str, seed: int = 0) -> nn.Module:
    """The small model of a builder, the same for the same seed, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BUILDERS[name]().eval()


def samples(name: str, seed: int = 0) -> dict[str, Any]:
    """A batch of three for :func:`build`'s model."""
    generator = torch.Generator().manual_seed(seed)
    side = 32 if name == "clip/resnet" else PIXELS
    image = torch.randn(3, 3, side, side, generator=generator)
    batch: dict[str, Any] = {"text_input": list(WORDS), "epoch": 1, "iters": 1, "num_iters_per_epoch": 2}
    if name.startswith("alpro"):
        batch["video"] = torch.randn(3, 3, 2, side, side, generator=generator)
        batch["answers"] = torch.tensor([0, 1, 2])
        return batch
    batch.update(image=image, image_id=torch.tensor([1, 2, 3]), label=torch.tensor([0, 1, 1]))
    batch.update(image0=image, image1=image.flip(0), text_output=["red", "a square", "star"])
    batch.update(answer=["red", "blue", "green", "star"], weight=torch.ones(4) / 2, n_answers=torch.tensor([1, 2, 1]))
    return batch


def loss_of(name: str, model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The model's training loss; a plain one of its output where LAVIS has none, or one that fails."""
    if name in ("blip_image_text_matching", "blip2_image_text_matching"):
        return F.cross_entropy(model(batch, match_head="itm"), batch["label"])
    if name == "blip_classification":  # its training output has a field that LAVIS 1.0.2 forgot to declare
        return F.cross_entropy(model.predict(batch)["predictions"], batch["label"])
    if name.endswith("_feature_extractor"):  # extract_features computes without gradients
        text = model.tokenizer(batch["text_input"], padding="longest", return_tensors="pt")
        embeds = model.visual_encoder.forward_features(batch["image"])
        return model.text_encoder.forward_automask(text, embeds).last_hidden_state.sin().mean()
    return model(batch)["loss"]
