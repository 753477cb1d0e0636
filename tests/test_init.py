"""What importing the package does, with LAVIS and without."""

import os
import subprocess
import sys

import lavis.models
import pytest
import torch
from lavis.common.registry import registry

import lavis_aurora

WITHOUT_LAVIS = """
import importlib.util, sys
original = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "lavis" else original(name, *rest)
import torch
import lavis_aurora, lavis_aurora.alignment
from lavis_aurora import ModeApproxConfig, inject_mode_approx
model = torch.nn.ModuleDict({"query": torch.nn.Linear(4, 4)})
inject_mode_approx(model, ModeApproxConfig(rank=2), ["query"])
heavy = {"lavis", "omegaconf", "transformers", "timm", "torchvision"} & set(sys.modules)
assert not heavy, heavy
try:
    from lavis_aurora import load_model_and_preprocess
except ImportError as error:
    assert "lavis not installed; type: pip install --no-deps salesforce-lavis" in str(error)
else:
    raise SystemExit("there is a loader")
"""

WITH_LAVIS = """
import sys, warnings
warnings.simplefilter("ignore")
import lavis_aurora_compat, lavis, torch
from lavis.common.registry import registry
def state():
    import logging, os
    hub, root = torch.hub.get_dir(), registry.get_path("cache_root")
    return hub, root, torch.get_default_dtype(), logging.getLogger().handlers, dict(os.environ)
before, packages = state(), {name.partition(".")[0] for name in sys.modules}
import lavis_aurora
assert state() == before, state()
more = {name.partition(".")[0] for name in sys.modules} - packages
assert more == {"lavis_aurora", "good_plugin"} and sys.modules["good_plugin"].LOADED, more
lavis_aurora.load_model_and_preprocess("blip_retrieval_aurora", "tiny")
assert torch.hub.get_dir() == "/data/of/aurora/weights"
assert registry.get_path("cache_root") == before[1]
"""
PLUGINS = {
    "good_plugin.py": "from lavis_aurora import AuroraError; LOADED = True",
    "bad_plugin.py": "raise ValueError('two\\nlines')",
    "plugins-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: plugins\nVersion: 1\n",
    "plugins-1.dist-info/entry_points.txt": "[lavis_aurora.plugins]\ngood = good_plugin:NAME\nbad = bad_plugin\n",
}


def test_importing_only_registers_and_imports_plugins(tmp_path):
    """The program stays as it is, and no package but plugins is imported that LAVIS does not import.

    A broken plugin is named in one line. A load uses AURORA_DATA.
    """
    for name, content in PLUGINS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "AURORA_DATA": "/data/of/aurora"}
    done = subprocess.run([sys.executable, "-c", WITH_LAVIS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "plugin" in line]
    assert line == "plugin bad (bad_plugin) is left out: ValueError: two lines"


def test_everything_is_registered():
    assert registry.get_model_class("blip_retrieval_aurora").__module__.startswith("lavis_aurora")
    assert registry.get_builder_class("demo_retrieval") is not None
    assert registry.get_task_class("retrieval_aurora") is not None
    assert registry.get_runner_class("runner_aurora") is not None


def test_the_method_needs_torch_alone():
    done = subprocess.run([sys.executable, "-c", WITHOUT_LAVIS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_exist():
    for name in lavis_aurora.__all__:
        assert getattr(lavis_aurora, name) is not None


@pytest.mark.parametrize("load", [lavis_aurora.load_model_and_preprocess, lavis.models.load_model_and_preprocess])
def test_the_tiny_model_loads_and_scores_pictures(load):
    from PIL import Image

    model, vis, txt = load("blip_retrieval_aurora", "tiny", is_eval=True)
    image = vis["eval"](Image.new("RGB", (64, 64), "white")).unsqueeze(0)
    text = model.tokenize([txt["eval"]("A large red circle, at the top!")])
    with torch.no_grad():
        tokens = model.visual_encoder.forward_features(image)
        words = model.text_encoder.forward_text(text).last_hidden_state
    assert tokens.shape == (1, 10, 128)
    assert words.isfinite().all()
    # Weights are stored in half precision and computed with in single.
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_unknown_names_and_types_are_answered_with_near_ones():
    with pytest.raises(lavis_aurora.AuroraError, match="no model 'blip_retrieval_aurara'; did you mean 'blip_retrie"):
        lavis_aurora.load_model_and_preprocess("blip_retrieval_aurara")
    with pytest.raises(lavis_aurora.AuroraError, match="no model type 'tinny'; did you mean 'tiny'"):
        lavis_aurora.load_model_and_preprocess("blip_retrieval_aurora", "tinny")


def test_the_default_type_is_the_papers_backbone():
    cls = registry.get_model_class("blip_retrieval_aurora")
    assert cls.DEFAULT_MODEL_TYPE == "base"
    assert set(cls.PRETRAINED_MODEL_CONFIG_DICT) == {"base", "large", "coco", "flickr", "tiny"}
