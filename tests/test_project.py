"""``model.adapter`` in a project YAML."""

import pytest
from tiny import project_yaml, tiny_model
from tiny_vqa import vqa_model

from lavis_aurora import AuroraError, save_adapter
from lavis_aurora.project import load_config


@pytest.fixture
def adapter(tmp_path):
    save_adapter(tiny_model(mode_approx={"rank": 5}, gate={"form": "affine"}), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_settings_of_the_adapter_stand_in_for_those_left_out(tmp_path, adapter):
    model = load_config(str(project_yaml(tmp_path)), [f"model.adapter={adapter}"]).model_cfg
    assert (model.mode_approx.rank, model.gate.form) == (5, "affine")
    assert model.queue_size == 16


def test_settings_of_the_yaml_are_kept(tmp_path, adapter):
    """What contradicts the adapter is refused when it is loaded, with both values."""
    yaml = project_yaml(tmp_path, model={"mode_approx": {"rank": 6}})
    model = load_config(str(yaml), [f"model.adapter={adapter}"]).model_cfg
    assert (model.mode_approx.rank, model.gate.form) == (6, "affine")
    with pytest.raises(AuroraError, match="mode_approx.rank is 5 there and 6 here"):
        tiny_model(mode_approx={"rank": 6}, gate={"form": "affine"}, adapter=str(adapter), adapter_check_base=False)


def test_share_decoder_belongs_to_an_adapter_of_question_answering(tmp_path):
    save_adapter(vqa_model(share_decoder=False), tmp_path / "adapter")
    model = {"arch": "blip_vqa_aurora", "queue_size": None}
    yaml = project_yaml(tmp_path, model=model)
    text = yaml.read_text().replace("  queue_size: null\n", "")
    yaml.write_text(text)
    assert load_config(str(yaml), [f"model.adapter={tmp_path / 'adapter'}"]).model_cfg.share_decoder is False


def test_a_folder_that_is_none_is_said_before_anything_is_built(tmp_path):
    yaml = project_yaml(tmp_path)
    with pytest.raises(AuroraError, match=f"project.yaml: model.adapter: {tmp_path} is no adapter folder"):
        load_config(str(yaml), [f"model.adapter={tmp_path}"])
