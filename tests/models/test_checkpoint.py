import argparse

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_model

from lavis_aurora import AuroraError
from lavis_aurora.models.loading import is_finite, read_state_dict


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
