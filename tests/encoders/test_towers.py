import json
import os

import pytest
import torch
from lavis.models.med import XBertEncoder
from tiny import med_config, tiny_model
from tiny_vqa import vqa_model
from transformers import BatchEncoding, BertConfig

from lavis_aurora import AuroraError
from lavis_aurora.encoders.fused import itm_context
from lavis_aurora.encoders.fusion import encode_with_image
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


def test_question_answering_needs_one_width(tmp_path):
    with pytest.raises(AuroraError, match="hidden_size 64 and encoder_width 128; the answer decoder attends"):
        vqa_model(med_config_path=med_config(tmp_path, hidden_size=64))


NOT_COMPUTED = [
    ({"position_embedding_type": "relative_key"}, 'it must be "absolute"'),
    ({"position_embedding_type": "relative_key_query"}, 'it must be "absolute"'),
    ({"position_embedding_type": "rotary"}, 'it must be "absolute"'),
    ({"add_cross_attention": False}, "it must be true"),
    ({"fusion_layer": 2}, "leave it out"),
    ({"fusion_layer": 0}, "leave it out"),
    ({"pruned_heads": {"0": [1]}}, "it must be {}"),
    ({"chunk_size_feed_forward": 5}, "it must be 0"),
]


@pytest.mark.parametrize(("change", "remedy"), NOT_COMPUTED, ids=str)
@pytest.mark.parametrize("build", [tiny_model, vqa_model])
def test_what_the_towers_would_not_heed_is_refused(tmp_path, build, change, remedy):
    [(key, value)] = change.items()
    with pytest.raises(AuroraError) as caught:
        build(med_config_path=med_config(tmp_path, **change))
    assert f"med_config.json has {key} {json.dumps(value)}, which cannot be computed" in str(caught.value)
    assert str(caught.value).endswith(remedy)


@pytest.mark.parametrize(
    "change", [{"hidden_act": "foo"}, {"hidden_size": -4}, {"hidden_size": "wide"}, {"num_attention_heads": 0}]
)
def test_values_that_build_no_bert_are_one_line(tmp_path, change):
    with pytest.raises(AuroraError, match="med_config.json is not a readable BERT configuration of BLIP") as caught:
        tiny_model(med_config_path=med_config(tmp_path, **change))
    assert "\n" not in str(caught.value)


# Every key that LAVIS's BERT reads outside training, with another value than the tiny model's.
OTHERS = {
    "hidden_act": "relu",
    "hidden_size": 64,
    "intermediate_size": 64,
    "layer_norm_eps": 0.1,
    "max_position_embeddings": 40,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "pad_token_id": 3,
    "vocab_size": 600,
    "initializer_range": 0.1,
    "add_type_embeddings": True,
    "chunk_size_feed_forward": 1,
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "torchscript": True,
    "use_cache": False,
    "is_decoder": True,
}


@pytest.mark.parametrize("key", OTHERS)
@torch.no_grad()
def test_every_other_key_of_the_configuration_counts_as_in_lavis(tmp_path, key):
    path = med_config(tmp_path, **{key: OTHERS[key]})
    ours = tiny_model(med_config_path=path, gate={"form": "none"}).eval().text_encoder
    plain = XBertEncoder(BertConfig.from_json_file(path), add_pooling_layer=False).eval()
    plain.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    ids, images = torch.randint(5, 400, (3, 7), generator=generator), torch.randn(3, 10, 128, generator=generator)
    lengths = torch.tensor([3, 5, 7])
    mask = (torch.arange(7) < lengths.unsqueeze(1)).long()
    text = BatchEncoding({"input_ids": ids, "attention_mask": mask})
    expected = plain.forward_text(text).last_hidden_state[mask > 0]
    torch.testing.assert_close(ours.forward_text(text).last_hidden_state[mask > 0], expected)
    expected = plain.forward_automask(text, images).last_hidden_state[:, 0]
    torch.testing.assert_close(ours.forward_automask(text, images).last_hidden_state[:, 0], expected)
    with itm_context(ours, torch.tensor([1, 2, 0])):
        passes = ours(ids.repeat(3, 1), mask.repeat(3, 1), encoder_hidden_states=images, return_dict=True)
    torch.testing.assert_close(passes.last_hidden_state[:3, 0], expected)
    one = plain.forward_automask(text, images[:1].expand(3, -1, -1)).last_hidden_state[:, 0]
    torch.testing.assert_close(encode_with_image(ours, ids, lengths, images[0]), one)


def test_a_folder_without_vocabulary_is_named(tmp_path):
    with pytest.raises(AuroraError, match="holds no vocab.txt"):
        build_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_pipe_in_the_place_of_a_tokenizers_file_is_not_waited_for(tmp_path, name):
    source = tmp_path / "words"
    if name:
        source.mkdir()
        (source / "vocab.txt").write_text("[PAD]")
        (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    with pytest.raises(AuroraError, match=f"model.tokenizer: {source / name} cannot be read .it is a pipe"):
        build_tokenizer(str(source))


def test_a_pipe_in_the_place_of_the_text_towers_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "med.json")
    with pytest.raises(AuroraError, match="model.med_config_path: .*med.json is not a readable .* it is a pipe"):
        tiny_model(med_config_path=str(tmp_path / "med.json"))


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
