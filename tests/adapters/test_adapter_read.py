"""An adapter folder from a stranger: every damaged bit is noticed, and nothing in it acts or is beyond reason."""

import json
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from toy import adapted_toy, as_format_1, inputs, rewrite_adapter

from lavis_aurora import AuroraError, load_adapter, save_adapter
from lavis_aurora.adapters.config import CONFIG, METADATA, TENSORS, read_adapter, read_adapter_config

FLIPS = 200


@pytest.fixture
def folder(tmp_path):
    save_adapter(adapted_toy(), tmp_path / "adapter", metrics={"epoch": 3, "rate": 1e-05}, description={"note": "é"})
    return tmp_path / "adapter"


# Checksums


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_no_flipped_bit_goes_unnoticed(folder, name):
    content = (folder / name).read_bytes()
    for bit in random.Random(0).sample(range(8 * len(content)), FLIPS):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(changed)
        with pytest.raises(AuroraError, match=str(folder)):
            read_adapter(folder)
    (folder / name).write_bytes(content)
    read_adapter(folder)


@pytest.mark.parametrize("change", [b"x", b"\n"])
def test_the_settings_beside_the_tensors_are_those_in_them(folder, change):
    path = folder / CONFIG
    path.write_bytes(path.read_bytes() + change)
    with pytest.raises(AuroraError, match=f"{TENSORS} is not the file that {CONFIG} beside it belongs to, or one of"):
        read_adapter(folder)


def test_settings_without_their_copy_are_refused(folder):
    text = (folder / CONFIG).read_text()
    as_format_1(folder)
    (folder / CONFIG).write_text(text)
    with pytest.raises(AuroraError, match="is not the file that"):
        read_adapter(folder)
    shutil.rmtree(folder)
    save_adapter(adapted_toy(), folder)
    (folder / CONFIG).write_text(text.replace('"format": 2', '"format": 1'))
    with pytest.raises(AuroraError, match="is not the file that"):
        read_adapter(folder)


def test_a_folder_of_an_older_version_loads_and_says_that_its_settings_have_no_checksum(folder, caplog):
    as_format_1(folder)
    fresh = adapted_toy(update_seed=9)
    load_adapter(fresh, folder)
    assert torch.equal(fresh(inputs()), adapted_toy()(inputs()))
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} is of an older version: no checksum covers its settings; save it again"
    ]
    save_adapter(fresh, folder)
    caplog.clear()
    load_adapter(adapted_toy(update_seed=9), folder)
    assert not caplog.records


# Hostile settings


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


HOSTILE = [
    ({"mode_approx": {"rank": 10**9}}, "mode_approx.rank: 1000000000 cannot be used; it must be .* at most 16384"),
    ({"mode_approx": {"rank": 16384}}, r"factors.P is \(5, 4\), not \(5, 16384\)"),
    ({"mode_approx": {"rank": True}}, "mode_approx.rank: True is not a int"),
    ({"mode_approx": {"rank": 4, "scale": 1e308}}, "mode_approx.scale: 1e[+]308 cannot be used"),
    ({"mode_approx": {"rank": 4, "sharing": "${oc.env:SECRET}"}}, r"mode_approx.sharing: '\$\{oc.env:SECRET\}'"),
    ({"mode_approx": {"rank": 4, "targets": "("}}, "is no regular expression"),
    ({"mode_approx": {"rank": 4, "targets": "(" * 20_000}}, "is no regular expression"),
    ({"slots": {"query": [10**12, 6]}}, r"slots.query: .* is not \[d_in, d_out\] of at most"),
    ({"slots": {}}, "slots: empty"),
    ({"slots": {"${x}": [24, 6]}}, "slots: .* nothing in it is resolved"),
    ({"base": {"sha256": "0" * 64, "name": "${x}"}}, "base.name: .* nothing in it is resolved"),
    ({"base": {"sha256": "no"}}, "base.sha256: 'no' is no hash"),
    ({"base": {"sha256": "0" * 64, "dtype": "\x1b[2J"}}, r"base.dtype: '\\x1b\[2J' is no type of weights"),
    ({"model": {"settings": [1]}}, r"model.settings: \[1\] is not a dict"),
    ({"model": {"model_type": {"a": 1}}}, "model.model_type: .* is not a str"),
    ({"model": {"arch": 3}}, "model.arch: 3 is not a str"),
    ({"model": {"preprocess": "blip"}}, "model.preprocess: 'blip' is not a dict"),
    ({"model": {"text_config": "blip"}}, "model.text_config: 'blip' is not a dict"),
    ({"model": {"settings": {"image_size": 10**9}}}, "model.settings.image_size: 1000000000 cannot be used"),
    ({"model": {"settings": {"vit": {"depth": 10**4}}}}, "model.settings.vit.depth: 10000 cannot be used"),
    ({"model": {"settings": {"queue_size": [-(10**12)]}}}, "model.settings.queue_size: -1000000000000 cannot"),
    ({"model": {"settings": {"a": ["${x}"]}}}, "model.settings.a: .* nothing in it is resolved"),
    ({"model": {"settings": {"a": "???"}}}, "model.settings.a: .* nothing in it is resolved"),
    ({"metrics": {"${x}": 1}}, "metrics: .* nothing in it is resolved"),
]


@pytest.mark.parametrize(("change", "words"), HOSTILE, ids=[str(change)[:60] for change, _ in HOSTILE])
@pytest.mark.parametrize("older", [False, True])
def test_settings_beyond_reason_are_named_before_anything_is_built(folder, monkeypatch, change, words, older):
    monkeypatch.setenv("SECRET", "hunter2")
    (as_format_1 if older else rewrite_adapter)(folder, **change)
    with pytest.raises(AuroraError, match=words) as caught:
        read_adapter_config(folder)
    assert str(folder) in str(caught.value) and "hunter2" not in str(caught.value)
    assert str(caught.value).isprintable()


UNUSUAL = {
    "empty": "",
    "list": "[1]",
    "latin-1": b"\xff",
    "deep": nested(10**6),
    "deep in a key": '{"slots": ' + nested(900) + "}",
    "open": '{"a":' * 10**5,
    "constant": "NaN",
    "digits": "9" * 9999,
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_json_that_no_one_writes(folder, kind):
    as_format_1(folder)
    content = UNUSUAL[kind]
    (folder / CONFIG).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AuroraError, match=f"^{re.escape(str(folder / CONFIG))}: "):
        read_adapter(folder)


@pytest.mark.parametrize("kind", ["F4", "F8_E8M0", "F8_E4M3", "U16", "C64", "BOOL", "XX"])
def test_tensors_of_odd_types(folder, kind):
    content = (folder / TENSORS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    bits = {"F4": 4, "F8_E8M0": 8, "F8_E4M3": 8, "BOOL": 8, "U16": 16, "C64": 64}.get(kind, 32)
    size = header["factors.P"]["data_offsets"][1] - header["factors.P"]["data_offsets"][0]
    header["factors.P"].update(dtype=kind, shape=[8 * size // bits])
    text = json.dumps(header).encode()
    (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(AuroraError, match=TENSORS):
        read_adapter(folder)


def test_a_header_whose_metadata_are_null(folder):
    content = (folder / TENSORS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = json.dumps({**json.loads(content[8 : 8 + length]), "__metadata__": None}).encode()
    (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(AuroraError, match="is not the file that"):
        read_adapter(folder)


def test_a_header_that_promises_more_than_the_file_holds(folder):
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes((2**62).to_bytes(8, "little") + content[8:])
    with pytest.raises(AuroraError, match="not a readable safetensors file"):
        read_adapter(folder)


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(AuroraError, match="model.note: .* nothing in it is resolved"):
        save_adapter(adapted_toy(), tmp_path / "new", description={"note": "${x}"})
    assert not (tmp_path / "new").exists()


def test_names_in_the_files_cannot_act_on_the_terminal(folder):
    tensors = {**load_file(folder / TENSORS), "heads.\x1b[2J\u202e": torch.ones(1)}
    rewrite_adapter(folder, tensors)
    with pytest.raises(AuroraError) as caught:
        load_adapter(adapted_toy(), folder)
    assert r"heads.\x1b[2J\u202e has no place here" in str(caught.value) and str(caught.value).isprintable()


def test_the_tensors_file_tells_its_settings_by_itself(folder):
    from safetensors import safe_open

    with safe_open(folder / TENSORS, "pt") as file:
        assert file.metadata() == {METADATA: (folder / CONFIG).read_text()}
