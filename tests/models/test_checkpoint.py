import argparse

import pytest
import torch
from lavis.common.registry import registry
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tiny import lavis_towers, tiny_config, tiny_model

from lavis_aurora import AuroraError, load_adapter, load_model_and_preprocess, save_adapter
from lavis_aurora.encoders.towers import build_tokenizer
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.models.hugging_face import to_hugging_face
from lavis_aurora.models.loading import is_finite, read_state_dict
from lavis_aurora.models.mode_approx_model import ModeApproxModel


@pytest.fixture
def plain() -> dict[str, torch.Tensor]:
    """A checkpoint as LAVIS's plain model would give it: no adapter, no queue."""
    state = tiny_model(tuning="frozen").state_dict()
    return {k: v for k, v in state.items() if "queue" not in k and "_m." not in k}


def load(plain: dict[str, torch.Tensor], tmp_path, suffix: str = ".pth", **overrides):
    path = tmp_path / f"blip{suffix}"
    if suffix == ".safetensors":
        save_file(plain, path)
    else:
        torch.save({"model": plain}, path)
    return tiny_model(pretrained=str(path), **overrides)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_backbone_loads_and_the_teacher_follows(plain, tmp_path, suffix):
    model = load(plain, tmp_path, suffix)
    state = model.state_dict()
    for key, value in plain.items():
        assert torch.equal(state[key], value), key
    assert torch.equal(state["vision_proj_m.weight"], plain["vision_proj.weight"])
    sets = model.mode_approx.sets
    for a, b in zip(sets["default"].parameters(), sets["momentum"].parameters()):
        assert torch.equal(a, b)


def test_missing_weights_are_named(plain, tmp_path):
    del plain["visual_encoder.norm.weight"]
    with pytest.raises(AuroraError, match=r"blip.pth lacks 1 weights of the model: visual_encoder.norm.weight"):
        load(plain, tmp_path)


def test_a_deeper_checkpoint_is_refused(plain, tmp_path):
    plain = {**plain, "visual_encoder.blocks.9.norm1.weight": torch.ones(32)}
    with pytest.raises(AuroraError, match="no place for: visual_encoder.blocks.9"):
        load(plain, tmp_path)


def test_weights_of_other_models_are_ignored_and_logged(plain, tmp_path, caplog):
    with caplog.at_level("INFO"):
        load({**plain, "text_decoder.bert.x": torch.ones(1), "image_queue": torch.ones(3)}, tmp_path)
    assert "not needed here: text_decoder" in caplog.text


def test_other_shapes_are_refused_with_both(plain, tmp_path):
    plain["text_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(AuroraError, match=r"text_proj.weight is \(3, 3\) there and \(64, 128\) here"):
        load(plain, tmp_path)


def test_position_embeddings_are_stretched_to_the_image_size(plain, tmp_path):
    for size in (64, 32):
        own = load(plain, tmp_path, image_size=size).visual_encoder.pos_embed
        before = plain["visual_encoder.pos_embed"]
        assert own.shape[1] == (size // 16) ** 2 + 1
        assert torch.equal(own[:, 0], before[:, 0])
        grid = before[0, 1:].T.reshape(1, -1, 3, 3)
        stretched = torch.nn.functional.interpolate(grid, size=(size // 16, size // 16), mode="bicubic")
        torch.testing.assert_close(own[0, 1:], stretched[0].flatten(1).T)


def test_missing_file_names_the_key(tmp_path):
    with pytest.raises(AuroraError, match="model.pretrained: no such file: .*nothing.pth"):
        tiny_model(pretrained=str(tmp_path / "nothing.pth"))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_broken_files_are_refused(tmp_path, content, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(AuroraError, match="not a readable checkpoint|holds more than tensors"):
        read_state_dict(str(path), "model.pretrained")


def test_a_flipped_bit_in_weights_is_noticed(tmp_path):
    path, weights = tmp_path / "weights.pth", torch.randn(1000)
    torch.save({"model": {"a": weights}}, path)
    content = path.read_bytes()
    place = content.index(weights.numpy().tobytes()) + 2000
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(AuroraError, match="model.pretrained: .*weights.pth is not a readable checkpoint .damaged"):
        read_state_dict(str(path), "model.pretrained")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_numbers_are_told_from_what_is_none(dtype):
    assert is_finite(torch.ones(3).to(dtype)) and is_finite(torch.empty(0, dtype=dtype))
    assert not is_finite(torch.tensor([1.0, float("nan"), 1.0]).to(dtype))


def test_nothing_that_could_run_code_is_unpickled(tmp_path):
    path = tmp_path / "namespace.pth"
    torch.save({"model": {}, "config": argparse.Namespace(a=1)}, path)
    with pytest.raises(AuroraError, match="holds more than tensors and is not unpickled"):
        read_state_dict(str(path), "model.pretrained")


def test_a_file_without_tensors_is_refused(tmp_path):
    path = tmp_path / "text.pth"
    torch.save({"model": {"a": "b"}}, path)
    with pytest.raises(AuroraError, match="no state dict of tensors"):
        read_state_dict(str(path), "model.pretrained")


# Forms of a file


def with_prefix(prefix: str):
    return lambda plain: {"model": {prefix + key: value for key, value in plain.items()}}


class PlainTiny(BlipRetrieval):
    """LAVIS's model of the tiny size, which loads by LAVIS's rules."""

    PRETRAINED_MODEL_CONFIG_DICT = {"tiny": BlipRetrievalAurora.PRETRAINED_MODEL_CONFIG_DICT["tiny"]}

    @classmethod
    def init_tokenizer(cls):
        return build_tokenizer(tiny_config().tokenizer)

    @classmethod
    def from_config(cls, cfg=None):
        model = cls(*lavis_towers(tiny_config()), queue_size=16, embed_dim=cfg.embed_dim, negative_all_rank=False)
        model.load_checkpoint_from_config(cfg)
        return model


@pytest.fixture
def around(monkeypatch):
    """Builds mode_approx around LAVIS's model with these weights."""
    monkeypatch.setitem(registry.mapping["model_name_mapping"], "plain_tiny", PlainTiny)

    def build(**weights) -> ModeApproxModel:
        base = {"arch": "plain_tiny", "model_type": "tiny", **weights}
        method = {"rank": 4, "targets": ["blip_retrieval"]}
        return ModeApproxModel.from_config(
            OmegaConf.create({"arch": "mode_approx", "base": base, "mode_approx": method})
        )

    return build


FORMS = {
    "bare": dict,
    "state_dict": lambda plain: {"state_dict": plain, "epoch": 3},
    "nested": lambda plain: {"model": {"state_dict": plain}},
    "model_state_dict": lambda plain: {"model_state_dict": plain},
    "deepspeed": lambda plain: {"module": plain},
    **{prefix: with_prefix(prefix) for prefix in ("module.", "_orig_mod.", "model.")},
    **{prefix: with_prefix(prefix) for prefix in ("module._orig_mod.", "_orig_mod.module.", "model.module.")},
    "compiled parts": lambda plain: {key.replace(".", "._orig_mod.", 1): value for key, value in plain.items()},
    "lightning": lambda plain: {
        "state_dict": {**with_prefix("model.")(plain)["model"], "loss.weight": torch.ones(1)}
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_wrappers_and_prefixes_are_taken_away(plain, tmp_path, form):
    torch.save(FORMS[form](plain), tmp_path / "blip.pth")
    state = tiny_model(seed=1, pretrained=str(tmp_path / "blip.pth")).state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.items())


@pytest.mark.parametrize("form", FORMS)
def test_half_a_checkpoint_stays_half_a_checkpoint(plain, tmp_path, form):
    torch.save(FORMS[form]({k: v for k, v in plain.items() if "blocks.1" not in k}), tmp_path / "blip.pth")
    with pytest.raises(AuroraError, match=r"blip.pth lacks 12 weights of the model: visual_encoder.blocks.1."):
        tiny_model(pretrained=str(tmp_path / "blip.pth"))


@pytest.mark.parametrize(("made", "named"), [("safetensors", "blip.pth"), ("torch", "blip.safetensors")])
def test_the_content_tells_the_format_and_not_the_name(plain, tmp_path, made, named):
    path = tmp_path / named
    save_file(plain, path) if made == "safetensors" else torch.save(plain, path)
    assert read_state_dict(str(path), "model.pretrained").keys() == plain.keys()


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1"])
def test_what_a_file_begins_with_is_shown(tmp_path, content):
    (tmp_path / "blip.pth").write_bytes(content)
    with pytest.raises(
        AuroraError, match="neither of safetensors nor of torch.save: it begins with b'.*(DOC|git-lfs)"
    ):
        tiny_model(pretrained=str(tmp_path / "blip.pth"))


def test_a_path_may_start_at_home(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(plain, tmp_path / "blip.pth")
    tiny_model(pretrained="~/blip.pth")
    model, _, _ = load_model_and_preprocess("blip_retrieval_aurora", "tiny", pretrained="~/blip.pth")
    save_adapter(model, "~/adapter")
    again = load_model_and_preprocess("blip_retrieval_aurora", adapter="~/adapter", pretrained="~/blip.pth")[0]
    load_adapter(again, "~/adapter", "another")
    assert (tmp_path / "adapter").is_dir()


# What is no backbone


def huggingface(plain):
    """Names of transformers' BlipModel, whose text tower is another."""
    return {key.replace("text_encoder", "text_model"): value for key, value in to_hugging_face(plain).items()}


def run_checkpoint(plain):
    entries = {"optimizer": {}, "scaler": None, "epoch": 0, "step": 1, "best_metric": 0.0, "best_epoch": None}
    return {"model": tiny_model().run_state(), "queue": {}, **entries}


OTHERS = {
    "run": (run_checkpoint, "it is a run's checkpoint.*model.adapter.*run.resume_ckpt_path"),
    "huggingface": (huggingface, "names are those of another model of Hugging Face.*: take one of BLIP of this kind"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_checkpoints_are_refused_with_the_remedy(plain, tmp_path, around, kind):
    make, remedy = OTHERS[kind]
    path = str(tmp_path / "checkpoint_best.pth")
    torch.save(make(plain), path)
    for build, weights in (
        (tiny_model, {"pretrained": path}),
        (around, {"pretrained": path, "load_finetuned": False}),
        (around, {"finetuned": path, "load_finetuned": True}),
    ):
        with pytest.raises(AuroraError, match=f"checkpoint_best.pth .*{remedy}"):
            build(**weights)


@pytest.mark.parametrize(("key", "form"), [("finetuned", "module."), *(("pretrained", form) for form in FORMS)])
def test_lavis_own_models_read_the_same_forms(plain, tmp_path, around, form, key):
    torch.save(FORMS[form](plain), tmp_path / "blip.pth")
    model = around(**{key: str(tmp_path / "blip.pth"), "load_finetuned": key == "finetuned"})
    assert type(model.base) is PlainTiny
    state = model.base.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.items() if name in state)
    assert torch.equal(state["visual_encoder_m.cls_token"], plain["visual_encoder.cls_token"])


def test_what_lavis_own_models_lack_is_said(plain, tmp_path, around, caplog):
    path = tmp_path / "blip.safetensors"
    save_file({name: value for name, value in plain.items() if not name.startswith("itm_head")}, path)
    model = around(finetuned=str(path), load_finetuned=True)
    assert "lacks 2 of " in caplog.text and "which stay as they are: itm_head" in caplog.text
    model.load_checkpoint(str(path))
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(AuroraError, match="model.base.finetuned .* lacks .* weights of the model: "):
        around(finetuned=str(path), load_finetuned=True)
    with pytest.raises(AuroraError, match="checkpoint .* lacks .* weights of the model: "):
        model.load_checkpoint(str(path))


def test_an_adapter_is_refused_with_the_key_to_name_it_by(tmp_path):
    save_adapter(tiny_model(), tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(AuroraError, match="model.pretrained: .* is an adapter, .* name it by model.adapter"):
            tiny_model(pretrained=str(path))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AuroraError, match="model.pretrained: a folder; name the file of weights in it"):
        tiny_model(pretrained=str(tmp_path))


def test_a_checkpoint_of_full_tuning_is_a_backbone(plain, tmp_path):
    torch.save({**run_checkpoint(plain), "model": tiny_model(tuning="full").run_state()}, tmp_path / "x.pth")
    tiny_model(pretrained=str(tmp_path / "x.pth"))
