"""Models loaded with an adapter from anyone: nothing is fetched but what the user or a registered type names."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tiny import activate, med_config, project_yaml, tiny_config, tiny_model
from toy import as_format_1, rewrite_adapter

from lavis_aurora import AuroraError, load_adapter, load_model_and_preprocess, save_adapter
from lavis_aurora.common.paths import package_file
from lavis_aurora.models.mode_approx_model import ModeApproxModel
from lavis_aurora.project import load_config
from lavis_aurora_cli import main

WEIGHTS = package_file("configs/models/tiny/model.safetensors")
VOCABULARY = Path(package_file("configs/models/tiny/vocab.txt"))
NAME = "blip_retrieval_aurora"


@pytest.fixture
def server():
    """A server on this machine; ``seen`` are the paths that were asked for."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            seen.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        running.seen, running.url = seen, f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path):
    """Of an adapter of the type tiny, with the type's own weights."""
    save_adapter(activate(tiny_model(pretrained=WEIGHTS, mode_approx={"rank": 4})), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def wrapped(tmp_path):
    """Of an adapter of mode_approx around the type tiny."""
    base = {"arch": NAME, "model_type": "tiny"}
    model = ModeApproxModel.from_config({"base": base, "mode_approx": {"rank": 4}})
    save_adapter(activate(model), tmp_path / "wrapped")
    return tmp_path / "wrapped"


def said(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())["model"]


def change_settings(folder: Path, older: bool = False, **changes) -> None:
    model = said(folder)
    change = as_format_1 if older else rewrite_adapter
    change(folder, model={**model, "settings": {**model["settings"], **changes}})


def sources(place: str) -> dict:
    """Everything that could be opened, at one place."""
    keys = ("pretrained", "finetuned", "tokenizer", "med_config_path")
    return {"load_finetuned": True, **{key: f"{place}/{key}.pth" for key in keys}}


# Nothing is taken


@pytest.mark.parametrize("older", [False, True])
def test_sources_in_an_adapter_are_not_used_and_named(folder, server, caplog, older):
    change_settings(folder, older, **sources(server.url), adapter_check_base=False)
    model, _, _ = load_model_and_preprocess(NAME, adapter=folder)
    assert server.seen == []
    own = tiny_config(pretrained=WEIGHTS)
    for key in ("pretrained", "tokenizer", "med_config_path"):
        assert getattr(model.settings, key) == own[key]
    assert model.settings.finetuned is None and model.settings.adapter_check_base
    [line] = [record.getMessage() for record in caplog.records if "not taken from the adapter" in record.message]
    assert "adapter_check_base, finetuned, load_finetuned, med_config_path, pretrained, tokenizer;" in line


@pytest.mark.parametrize("older", [False, True])
def test_nor_are_those_of_the_model_inside(wrapped, server, caplog, older):
    change_settings(wrapped, older, base={**said(wrapped)["settings"]["base"], **sources(server.url)})
    model, _, _ = load_model_and_preprocess("mode_approx", adapter=wrapped)
    assert server.seen == [] and model.settings.base["pretrained"] == WEIGHTS
    assert "base.finetuned, base.load_finetuned, base.med_config_path, base.pretrained" in caplog.text


def test_nor_by_a_project(tmp_path, folder, wrapped, server):
    change_settings(folder, **sources(server.url))
    cfg = load_config(
        str(project_yaml(tmp_path, count=1)), [f"model.adapter={folder}", f"model.pretrained={WEIGHTS}"]
    )
    assert server.url not in str(cfg.to_dict())
    assert cfg.model_cfg.mode_approx.rank == 4
    change_settings(wrapped, base={**said(wrapped)["settings"]["base"], **sources(server.url)})
    options = ["model.arch=mode_approx", "model.model_type=default", f"model.adapter={wrapped}"]
    path = project_yaml(tmp_path, count=1)
    text = path.read_text().replace("  pretrained: null\n", "").replace("  queue_size: 16\n", "")
    path.write_text(text)
    cfg = load_config(str(path), options)
    assert server.url not in str(cfg.to_dict()) and cfg.model_cfg.base.pretrained == WEIGHTS


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("key", ["pretrained", "tokenizer", "image_size"])
def test_nothing_is_interpolated(tmp_path, folder, server, monkeypatch, capsys, key, older):
    monkeypatch.setenv("TOKEN", "hunter2")
    change_settings(folder, older, **{key: server.url + "/${oc.env:TOKEN}.pth"})
    yaml = project_yaml(tmp_path, count=1)
    for action in (
        lambda: load_model_and_preprocess(NAME, adapter=folder),
        lambda: load_adapter(tiny_model(), folder),
        lambda: load_config(str(yaml), [f"model.adapter={folder}"]),
    ):
        with pytest.raises(AuroraError, match=f"model.settings.{key}: .* nothing in it is resolved") as caught:
            action()
        assert "hunter2" not in str(caught.value)
    for command in (["merge", str(folder), str(tmp_path / "x.pth")], ["inspect", str(folder)]):
        with pytest.raises(SystemExit):
            main(command)
    shown = capsys.readouterr()
    assert server.seen == [] and "hunter2" not in shown.out + shown.err


# Nothing is told


@pytest.mark.parametrize("wrap", [False, True])
def test_a_folder_tells_no_place_of_its_owner_and_loads_without_them(tmp_path, wrap):
    private = tmp_path / "private"
    shutil.copytree(VOCABULARY.parent, private)
    places = {
        "pretrained": str(private / "model.safetensors"),
        "tokenizer": str(private),
        "med_config_path": str(private / "med_config.json"),
    }
    if wrap:
        model = ModeApproxModel.from_config({"base": {"arch": NAME, "model_type": "tiny", **places}})
    else:
        model = tiny_model(**places)
    save_adapter(activate(model), tmp_path / "adapter")
    shutil.rmtree(private)
    content = b"".join(path.read_bytes() for path in (tmp_path / "adapter").iterdir())
    for word in ("private", str(tmp_path), str(VOCABULARY.parent), "http"):
        assert word.encode() not in content
    name = "mode_approx" if wrap else NAME
    loaded, _, _ = load_model_and_preprocess(name, adapter=tmp_path / "adapter")
    image = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        ours, theirs = (m.eval().visual_encoder.forward_features(image) for m in (model, loaded))
    assert torch.equal(ours, theirs)


def other_vocabulary(folder: Path) -> str:
    words = VOCABULARY.read_text().splitlines()
    words[-1], words[-2] = words[-2], words[-1]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return str(folder)


@pytest.mark.parametrize("wrap", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_the_user_must_name_is_asked_for_and_taken(tmp_path, wrap):
    weights = tmp_path / "weights.pth"
    torch.save({"model": tiny_model(seed=5, tuning="frozen").state_dict()}, weights)
    given = {
        "tokenizer": other_vocabulary(tmp_path / "words"),
        "med_config_path": med_config(tmp_path, num_attention_heads=2),
    }
    places = {**given, "pretrained": str(weights)}
    if wrap:
        model = ModeApproxModel.from_config({"base": {"arch": NAME, "model_type": "tiny", **places}})
    else:
        model = tiny_model(**places)
    adapter = tmp_path / "adapter"
    save_adapter(activate(model), adapter)
    name = "mode_approx" if wrap else NAME
    missing = [
        ("tokenizer", "another vocabulary; name its tokenizer"),
        ("med_config_path", "num_attention_heads of the text encoder is 2 there and 4 here; name its file"),
        ("pretrained", r"tuned on other weights \(without a name"),
    ]
    for key, words in missing:
        with pytest.raises(AuroraError, match=words):
            load_model_and_preprocess(name, adapter=adapter, **{k: v for k, v in places.items() if k != key})
    loaded, _, _ = load_model_and_preprocess(name, adapter=adapter, **places)
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert loaded.text_encoder.config.num_attention_heads == 2


def test_merge_takes_them_too(tmp_path, capsys):
    words = other_vocabulary(tmp_path / "words")
    save_adapter(tiny_model(pretrained=WEIGHTS, tokenizer=words, gate={"form": "none"}), tmp_path / "adapter")
    command = ["merge", str(tmp_path / "adapter"), str(tmp_path / "merged.pth")]
    with pytest.raises(SystemExit):
        main(command)
    assert "name its tokenizer" in capsys.readouterr().err
    config = package_file("configs/models/tiny/med_config.json")
    main([*command, "--tokenizer", words, "--med-config-path", config, "--pretrained", WEIGHTS])
    assert (tmp_path / "merged.pth").is_file()


def test_they_need_no_adapter(tmp_path):
    words = other_vocabulary(tmp_path / "words")
    model, _, _ = load_model_and_preprocess(NAME, "tiny", tokenizer=words)
    assert model.settings.tokenizer == words and model.backbone_source == WEIGHTS
    with pytest.raises(AuroraError, match="blip_vqa takes neither adapter nor pretrained, tokenizer"):
        load_model_and_preprocess("blip_vqa", "vqav2", tokenizer=words)
    with pytest.raises(AuroraError, match="tokenizer: blip_vqa takes none; leave it out"):
        load_model_and_preprocess("mode_approx", "blip_vqa/vqav2", tokenizer=words)


# Wrong values


WRONG = [
    ({"gate": 3}, "model.settings.gate: must be a section of keys, not 3"),
    ({"gate": [1]}, r"model.settings.gate: must be a section of keys, not \[1\]"),
    ({"gate": {"form": 1e9}}, "gate.form"),
    ({"mode_approx": [1]}, r"model.settings.mode_approx: must be a section of keys, not \[1\]"),
    ({"image_size": {"a": 1}}, "model.settings.image_size: "),
    ({"image_size": 4000, "vit": {"patch_size": 1, "embed_dim": 8192}}, "model.vit: .* at most 1 billion weights"),
    ({"vit": {"embed_dim": 4096, "depth": 12, "num_heads": 1}}, "model.vit: .* at most 1 billion weights"),
    ({"wheight": 1}, "model.settings.wheight: unknown key"),
    ({"mode_approx": {"targets": "(.*)*x"}}, "model.settings.mode_approx.targets: .* repeats too much"),
    ({"mode_approx": {"targets": [".*" * 20 + "x"]}}, "model.settings.mode_approx.targets: .* repeats too much"),
    ({"mode_approx": {"targets": "(.|[a-z_.])" * 30 + "!"}}, "targets: .* has too many alternatives"),
    ({"mode_approx": {"targets": "(?x)(.|..) *!"}}, "targets: .* repeats too much"),
    ({"mode_approx": {"targets": ["(.*a|.*b)"] * 3000}}, "targets: .* has too many alternatives"),
    ({"mode_approx": {"targets": "a" * 501}}, "targets: .* repeats too much"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[str(change)[:50] for change, _ in WRONG])
def test_settings_of_a_wrong_kind_are_one_line(folder, change, words):
    change_settings(folder, **change)
    with pytest.raises(AuroraError, match=words) as caught:
        load_model_and_preprocess(NAME, adapter=folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "targets", [r".*encoder.*layer.*\.(query|key|value)", r"text_encoder(\.bert)?\..*(query|key)"]
)
def test_usual_patterns_are_taken_from_an_adapter(folder, targets):
    model = tiny_model(pretrained=WEIGHTS, mode_approx={"rank": 4, "targets": targets})
    save_adapter(activate(model), folder)
    again, *_ = load_model_and_preprocess(NAME, adapter=folder)
    assert again.mode_approx.slots == model.mode_approx.slots


def test_what_an_adapter_says_of_itself_is_shown_short_and_quoted(folder):
    rewrite_adapter(folder, model={**said(folder), "arch": ""})
    with pytest.raises(AuroraError, match=f"is an adapter of '', not of {NAME}"):
        load_model_and_preprocess(NAME, adapter=folder)
    with pytest.raises(AuroraError, match="it is of '', and this is"):
        load_adapter(tiny_model(pretrained=WEIGHTS, mode_approx={"rank": 4}), folder)
    long = {"text_config": {"hidden_act": "x" * 10**5}, "settings": {"gate": {"form": "y" * 10**5}}}
    for key, value in long.items():
        rewrite_adapter(folder, model={**said(folder), "arch": NAME, key: value})
        with pytest.raises(AuroraError) as caught:
            load_adapter(tiny_model(pretrained=WEIGHTS, mode_approx={"rank": 4}), folder)
        assert len(str(caught.value)) < 2000
    rewrite_adapter(folder, model={"settings": ["x" * 10**5]})
    with pytest.raises(AuroraError, match="model.settings: .* is not a dict") as caught:
        load_model_and_preprocess(NAME, adapter=folder)
    assert len(str(caught.value)) < 1000


def test_sizes_of_a_run_are_not_an_adapters(folder, caplog):
    """They decide nothing of what it answers, and a queue takes the room that it is said to have."""
    assert not {"queue_size", "alpha", "momentum"} & said(folder)["settings"].keys()
    change_settings(folder, queue_size=2**18, embed_dim=64)
    model, *_ = load_model_and_preprocess(NAME, adapter=folder)
    assert model.settings.queue_size == 512
    assert "not taken from the adapter, which is data: queue_size" in caplog.text


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (3, "model.settings.base: "),
        ({"arch": ["x"]}, r"model.settings.base.arch: \['x'\] is not a str"),
        ({"arch": "nothing"}, "model.settings.base.arch: 'nothing' is no registered model"),
        ({"arch": NAME, "model_type": {"a": 1}}, "model.settings.base.model_type: .* is not a str"),
        ({"arch": NAME, "model_type": "tinny"}, "model_type: .* has no type 'tinny'; did you mean 'tiny'"),
        ({"arch": NAME, "model_type": "tiny", "gate": 3}, "model.settings.base.gate: "),
    ],
)
def test_a_base_of_a_wrong_kind_is_one_line(wrapped, base, words):
    change_settings(wrapped, base=base)
    with pytest.raises(AuroraError, match=words):
        load_model_and_preprocess("mode_approx", adapter=wrapped)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"sound": {}}, "model.preprocess.sound: unknown key"),
        ({"vis_processor": [1]}, r"model.preprocess.vis_processor: must be a section of keys, not \[1\]"),
        ({"vis_processor": {"evil": None}}, "model.preprocess.vis_processor.evil: unknown key; did you mean 'eval'"),
        ({"vis_processor": {"eval": 3}}, "model.preprocess.vis_processor.eval: must be a section"),
        ({"vis_processor": {"eval": {"name": "no"}}}, "vis_processor.eval.name: 'no' is no processor for"),
        ({"vis_processor": {"eval": {"name": ["no"]}}}, r"vis_processor.eval.name: \['no'\] is no processor for"),
        ({"text_processor": {"eval": {"name": "gpt_dialogue"}}}, "'gpt_dialogue' is no processor for"),
        ({"vis_processor": {"eval": {"name": "blip_image_eval", "image_size": "/etc"}}}, "text where a number"),
        ({"vis_processor": {"eval": {"name": "blip_image_eval", "size": 4}}}, "vis_processor.eval.size: unknown key"),
        ({"vis_processor": {"eval": {"name": "blip_image_eval", "mean": 4, "std": [[]]}}}, None),
    ],
)
def test_processors_of_a_wrong_kind_are_one_line(folder, part, words):
    rewrite_adapter(folder, model={**said(folder), "preprocess": part})
    if words is None:  # read when a picture is
        load_model_and_preprocess(NAME, adapter=folder)
        return
    with pytest.raises(AuroraError, match=words) as caught:
        load_model_and_preprocess(NAME, adapter=folder)
    assert str(folder / "adapter_config.json") in str(caught.value)


@pytest.mark.parametrize("wrap", [False, True])
def test_processors_of_an_adapter_make_pictures_of_its_models_size(tmp_path, wrap):
    """Of a model that was built in Python with another size than its type's."""
    model = tiny_model(pretrained=WEIGHTS, image_size=64)
    if wrap:
        base = {"arch": NAME, "model_type": "tiny", "image_size": 64, "pretrained": WEIGHTS}
        model = ModeApproxModel.from_config(OmegaConf.create({"base": base}))
    save_adapter(model, tmp_path)
    again, vis, _ = load_model_and_preprocess("mode_approx" if wrap else NAME, adapter=tmp_path)
    picture = vis["eval"](Image.new("RGB", (100, 80)))
    assert picture.shape == (3, 64, 64)
    with torch.no_grad():
        again.visual_encoder.forward_features(picture[None])
