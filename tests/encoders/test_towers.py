import json

import pytest
from tiny import med_config, tiny_model

from lavis_aurora import AuroraError
from lavis_aurora.encoders.towers import build_tokenizer


def test_vocabulary_must_fit_the_embeddings(tmp_path):
    with pytest.raises(AuroraError, match="model.tokenizer: .* tokens with .DEC. and .ENC., but"):
        tiny_model(med_config_path=med_config(tmp_path, vocab_size=50))


def test_text_must_fit_the_positions():
    with pytest.raises(AuroraError, match="model.max_txt_len: 100 tokens do not fit the 64 positions"):
        tiny_model(max_txt_len=100)


def test_encoder_width_must_be_the_vision_towers():
    with pytest.raises(AuroraError, match="encoder_width 128, but the vision encoder is 48 wide"):
        tiny_model(vit={"patch_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 2})


def test_a_folder_without_vocabulary_is_named(tmp_path):
    with pytest.raises(AuroraError, match="holds no vocab.txt"):
        build_tokenizer(str(tmp_path))


def test_an_unreachable_hub_name_says_what_to_do():
    with pytest.raises(
        AuroraError, match="cannot load 'no-such/tokenizer'; without access to the hub, name a folder"
    ):
        build_tokenizer("no-such/tokenizer")


def test_tokenizer_has_blips_two_tokens_last(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]))
    tokenizer = build_tokenizer(str(tmp_path))
    assert tokenizer.bos_token_id == 7
    assert tokenizer.enc_token_id == 8
    assert tokenizer("a cat").input_ids == [2, 5, 6, 3]


def test_large_type_names_a_wider_vision_tower():
    from lavis.common.registry import registry
    from lavis.common.utils import get_abs_path
    from omegaconf import OmegaConf

    cls = registry.get_model_class("blip_retrieval_aurora")
    cfg = OmegaConf.load(cls.default_config_path("large")).model
    with open(get_abs_path(cfg.med_config_path)) as file:
        assert json.load(file)["encoder_width"] == 1024
