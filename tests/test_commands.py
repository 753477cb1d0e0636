"""The command ``lavis-aurora``: inspect, merge, targets, configs, convert."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from distributed import start_apart
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tiny import activate, project_yaml, tiny_model
from toy import rewrite_adapter

from lavis_aurora import AuroraError, load_model_and_preprocess, save_adapter
from lavis_aurora.adapters.config import read_adapter_config
from lavis_aurora.cli import inspect, targets
from lavis_aurora.common.paths import package_file
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.models.export import merge
from lavis_aurora.models.mode_approx_model import ModeApproxModel
from lavis_aurora_cli import PROJECTS, configs, main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def failing(capsys):
    """Run the command, and return its one line of an error."""

    def run(*argv: object) -> str:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in argv])
        assert caught.value.code == 1
        [line] = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.fixture
def adapter(tmp_path):
    """The folder of an adapter on random weights, without gates."""
    model = activate(tiny_model(gate={"form": "none"}, mode_approx={"rank": 4}))
    save_adapter(model, tmp_path / "adapter", metrics={"epoch": 2, "val": {"image_to_text_r1": 41.234}})
    return tmp_path / "adapter"


# inspect


def test_inspect_a_folder(adapter, capsys):
    main(["inspect", str(adapter)])
    out = capsys.readouterr().out
    for words in (
        "blip_retrieval_aurora tiny",
        "without a name (sha256 ",
        "rank 4, scale 8.0",
        "27 of 128 x 128",
        "visual_encoder.blocks.*.attn.qkv: query, key, value\n",
        "text_encoder.encoder.layer.*.crossattention.self: query, key, value\n",
        "form none, init zeros",
        "image_to_text_r1 41.23",
        "torch ",
        "factors.U.128",
        "heads.vision_proj.weight",
    ):
        assert words in out
    numbers = 2 * 128 * 4 + 2 * 27 * 4 + sum(p.numel() for p in _heads())
    assert f"{numbers:,} numbers" in out
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert inspect(str(adapter / name)) + "\n" == out


def _heads():
    for head in tiny_model().heads:
        yield from [head] if isinstance(head, torch.nn.Parameter) else head.parameters()


def test_inspect_any_file_of_weights(tmp_path):
    weights = {f"layer.{i}.weight": torch.zeros(3, 2) for i in range(4)}
    weights["patch.weight"] = torch.zeros(128, 1, 16, 16)
    save_file(weights, tmp_path / "a.safetensors")
    torch.save({"model": {**weights, "temp": torch.zeros([])}}, tmp_path / "a.pth")
    for name, count in (("a.safetensors", 24), ("a.pth", 25)):
        table = inspect(str(tmp_path / name))
        [row] = [line.split() for line in table.splitlines() if line.startswith("layer.*.weight")]
        assert row == ["layer.*.weight", "3", "x", "2", "float32", "4", "24"]
        assert "  128 x 1 x 16 x 16  float32  " in table and f"{count + 128 * 256:,} numbers" in table


def test_inspect_what_is_none(tmp_path, adapter, failing):
    assert "no such file" in failing("inspect", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "is no adapter folder: it has no adapter_config.json" in failing("inspect", tmp_path / "empty")
    adapter.rename(tmp_path / "adapter_best")
    run = failing("merge", tmp_path, tmp_path / "x.pth")
    assert "is the folder of a run; name one of its adapters: adapter_best" in run
    (tmp_path / "text.pth").write_text("hello")
    assert "is not a readable checkpoint" in failing("inspect", tmp_path / "text.pth")


def test_what_may_not_be_read_is_one_line(failing, monkeypatch):
    def denied(_folder: str) -> None:
        raise PermissionError(13, "Permission denied", "theirs/adapter_config.json")

    monkeypatch.setattr("lavis_aurora.cli.read_adapter", denied)
    line = failing("diff", "theirs", "ours")
    assert line.startswith("error: ") and "Permission denied: 'theirs/adapter_config.json'" in line


def test_inspect_shows_names_and_does_not_act_by_them(adapter, tmp_path, capsys):
    said = json.loads((adapter / "adapter_config.json").read_text())
    rewrite_adapter(adapter, model={**said["model"], "arch": "\x1b[2Jarch"}, metrics={"\x07": 1.0})
    save_file({"layer.\x1b]0;title\x07\nrow": torch.zeros(3)}, tmp_path / "a.safetensors")
    for path in (adapter, tmp_path / "a.safetensors"):
        main(["inspect", str(path)])
    out = capsys.readouterr().out
    assert r"\x1b[2Jarch" in out and r"layer.\x1b]0;title\x07\nrow" in out
    assert out.replace("\n", "").isprintable()


# merge; that plain LAVIS loads the file and scores alike is tested in models/test_adapter_owner.py, and with the
# YAML that is printed in models/test_plain_lavis.py


def test_merge_needs_the_base_and_leaves_nothing_half_done(adapter, tmp_path, failing):
    output = tmp_path / "merged.pth"
    # The adapter's base were random weights, which no one has any more.
    assert "tuned on other weights" in failing("merge", adapter, output)
    assert "no such file: absent.pth" in failing("merge", adapter, output, "--pretrained", "absent.pth")
    assert not output.exists()
    output.write_text("mine")
    with pytest.raises(AuroraError, match=r"merged.pth is there already; name another file"):
        merge(str(adapter), str(output))
    assert output.read_text() == "mine"


def test_merge_of_an_adapter_that_does_not_name_its_model(adapter, tmp_path):
    rewrite_adapter(adapter, model={})
    with pytest.raises(AuroraError, match="does not name its model; use merged_state_dict"):
        merge(str(adapter), str(tmp_path / "merged.pth"))


def test_merge_around_another_model_names_that_one(tmp_path):
    base = {"arch": "blip_retrieval_aurora", "model_type": "tiny"}
    model = ModeApproxModel.from_config({"base": base, "mode_approx": {"rank": 4}})
    save_adapter(activate(model), tmp_path / "adapter")
    said = merge(str(tmp_path / "adapter"), str(tmp_path / "merged.pth"))
    assert "no YAML of plain LAVIS loads it" in said and "LAVIS's blip_retrieval such towers" in said


# targets


def test_targets(capsys, caplog):
    main(["targets", "blip_vqa_aurora", "--model-type", "tiny"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[1:] for line in lines}
    vision = rows["visual_encoder.blocks.*.attn.qkv.weight"]
    assert vision == ["384", "x", "128", "9", "query,", "key,", "value"]
    shared = rows["text_decoder.bert.encoder.layer.*.attention.self.key.weight"]
    assert shared == ["128", "x", "128", "3", "text_encoder.encoder.layer.*.attention.self.key"]
    assert lines[-1][:2] == ["27", "slots"]
    assert "RANDOM" not in caplog.text, "nobody asked for weights"


def test_targets_of_a_project(tmp_path):
    """Any LAVIS model that a YAML puts the method around; here one of this package, for its size."""
    base = {"arch": "blip_retrieval_aurora", "model_type": "tiny", "pretrained": None}
    yaml_path = project_yaml(tmp_path)
    data = {**yaml.safe_load(yaml_path.read_text()), "model": {"arch": "mode_approx", "base": base}}
    yaml_path.write_text(yaml.safe_dump(data))
    table = targets(str(yaml_path))
    assert "visual_encoder.blocks.*.attn.qkv.weight" in table
    assert "slots in all" in table


def test_targets_of_what_is_not_there(failing):
    assert "no model 'blip_retrieval_auror'; did you mean 'blip_retrieval_aurora'" in failing(
        "targets", "blip_retrieval_auror"
    )
    assert "model.model_type: unknown type 'tinny'; did you mean 'tiny'" in failing(
        "targets", "blip_retrieval_aurora", "--model-type", "tinny"
    )
    with pytest.raises(AuroraError, match="blip_caption is not a model of this package, as blip_retrieval_aurora"):
        targets("blip_caption")


# configs


def test_configs_are_those_of_the_source_tree():
    own = {path.name: path.read_text() for path in (ROOT / "projects" / "aurora").glob("*.yaml")}
    assert own and own == {path.name: path.read_text() for path in PROJECTS.glob("*.yaml")}
    listed = configs([])
    for name in own:
        assert name.removesuffix(".yaml") in listed
    assert "released/zeroshot_didemo  DiDeMo retrieval, zero-shot, as the authors" in listed
    assert "MSCOCO retrieval" in listed
    lines = " ".join(listed.split())
    assert "tuned on the shifted domain: other pictures, other questions, other answers. " in lines
    assert "answers generated greedily. " in lines and "scripts/demo.sh" not in listed
    assert max(map(len, listed.splitlines())) < 130


@pytest.mark.parametrize("arguments", [["configs"], ["--help"], ["train", "--help"]])
def test_what_needs_no_model_imports_none(arguments):
    """Which takes seconds."""
    code = (
        "import sys, lavis_aurora_cli\n"
        "try: lavis_aurora_cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'lavis', 'lavis_aurora'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith("set()\n"), done.stdout + done.stderr


def test_the_module_runs_as_the_command_does():
    done = subprocess.run(
        [sys.executable, "-m", "lavis_aurora_cli", "bogus"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "invalid choice: 'bogus'" in done.stderr


def test_configs_are_copied_and_nothing_is_overwritten(tmp_path, failing, capsys):
    main(["configs", "demo_ret", "coco_ret.yaml", "--to", str(tmp_path / "new")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "new" / f"{n}.yaml") for n in ("demo_ret", "coco_ret")]
    assert (
        yaml.safe_load((tmp_path / "new" / "demo_ret.yaml").read_text())["model"]["arch"] == "blip_retrieval_aurora"
    )
    assert "demo_ret.yaml is there already" in failing("configs", "demo_ret", "--to", tmp_path / "new")
    main(["configs", "released/demo_ret", "--to", str(tmp_path / "new")])
    assert (tmp_path / "new/released/demo_ret.yaml").read_text() == (PROJECTS / "released/demo_ret.yaml").read_text()
    assert "no project 'demo_rat'; did you mean 'demo_ret'" in failing("configs", "demo_rat")
    place = tmp_path / "new" / "demo_ret.yaml"  # no folder
    assert f"cannot write {place / 'coco_ret.yaml'} (" in failing("configs", "coco_ret", "--to", place)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["coco_ret", "demo_ret"], "demo_ret.yaml is there already"),
        (["coco_ret", "demo_rat"], "no project 'demo_rat'; did you mean 'demo_ret'"),
    ],
)
def test_configs_are_copied_all_or_none(tmp_path, failing, names, message):
    (tmp_path / "demo_ret.yaml").write_text("mine")
    assert message in failing("configs", *names, "--to", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["demo_ret.yaml"]
    assert (tmp_path / "demo_ret.yaml").read_text() == "mine"


def inspect_for_nobody(errors: Path) -> None:
    """Print into a pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    main(["inspect", package_file("configs/models/tiny/model.safetensors")])


def test_a_reader_that_has_had_enough_ends_the_command_quietly(tmp_path):
    process = start_apart(inspect_for_nobody, tmp_path / "errors")
    process.join()
    assert process.exitcode == 1 and "Traceback" not in (tmp_path / "errors").read_text()


# convert


def test_convert_has_options_of_its_own(tmp_path, capsys, failing):
    (tmp_path / "val.csv").write_text("image,caption\na.jpg,a dog\n")
    main(["convert", "own", str(tmp_path / "val.csv"), "--output", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "val.json").read_text()) == [{"image": "a.jpg", "caption": ["a dog"]}]
    assert "val: 1 with 1 texts" in capsys.readouterr().out
    assert failing("convert", "own", "absent.csv").startswith("error: absent.csv is not a readable file")
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "msrvtt_qa" in capsys.readouterr().out


# truncate


def test_truncate_an_adapter(tmp_path, capsys, failing, monkeypatch):
    """What it writes is a whole adapter folder, which is loaded like any other, with the settings that it says."""
    name, method = "blip_retrieval_aurora", {"rank": 8, "nested": True, "nested_ranks": [2, 4]}
    config = OmegaConf.load(BlipRetrievalAurora.default_config_path("tiny")).model
    model = activate(BlipRetrievalAurora.from_config(OmegaConf.merge(config, {"mode_approx": method}))).eval()
    save_adapter(model, tmp_path / "whole", metrics={"epoch": 2, "val": {"agg_metrics": 41.0}})
    main(["truncate", str(tmp_path / "whole"), "--rank", "4"])
    folder = tmp_path / "whole_rank4"
    assert str(folder) in capsys.readouterr().out
    assert read_adapter_config(folder).metrics == {}
    other, *_ = load_model_and_preprocess(name, adapter=folder, is_eval=True)
    image = torch.randn(1, 3, 48, 48)
    with model.mode_approx.first(4), torch.no_grad():
        expected = model.match(image, ["a red circle"])
    with torch.no_grad():
        torch.testing.assert_close(other.match(image, ["a red circle"]).itm_logits, expected.itm_logits)
    assert failing("truncate", tmp_path / "whole", "--rank", 4).endswith("name another folder by --out")
    assert "must be 1 to 8" in failing("truncate", tmp_path / "whole", "--rank", 9, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.chdir(tmp_path / "whole")
    main(["truncate", ".", "--rank", "2"])
    assert read_adapter_config(tmp_path / "whole_rank2").settings.rank == 2
