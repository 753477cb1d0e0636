"""What a search gives: plain ITC by numpy, ITM as the model has it; what an index is bound to."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import activate, tiny_model

from lavis_aurora import AuroraError, load_model_and_preprocess, load_picture, save_adapter
from lavis_aurora.common.paths import package_file
from lavis_aurora.search import PictureIndex
from lavis_aurora.search import index as index_module
from lavis_aurora.search import store as store_module
from lavis_aurora.search.files import PICTURE, FileState, look_through
from lavis_aurora.search.store import Entry

TEXT = "a big red star at upper left"


@pytest.fixture(scope="module")
def plain(made):
    """The model and the pixels of all pictures, by LAVIS's own loader and processors."""
    model, vis, txt = load_model_and_preprocess("blip_retrieval_aurora", "tiny", is_eval=True)
    paths = sorted((made / "shapes").iterdir())
    return model, txt["eval"], paths, torch.stack([vis["eval"](load_picture(path)) for path in paths])


@torch.no_grad()
def features(model, images, texts):
    tokens = model.tokenize(texts)
    return (
        model.image_features({"image": images})[1].numpy(),
        model.text_features(tokens.input_ids, tokens.attention_mask).numpy(),
    )


def normalised(x):
    return x / np.linalg.norm(x)


PICTURES = "kind = 'picture'"


def test_the_ranking_is_that_of_numpy(indexed, plain):
    model, txt, paths, images = plain
    pictures, [text] = features(model, images, [txt(TEXT)])
    scores = pictures @ text
    hits = indexed.search(TEXT, top=100, rerank=0, where=PICTURES)
    assert [hit.path for hit in hits] == [str(paths[i]) for i in np.argsort(-scores, kind="stable")]
    np.testing.assert_allclose([hit.itc for hit in hits], np.sort(scores)[::-1], atol=1e-5)
    assert [hit.itc_rank for hit in hits] == list(range(1, 25))
    assert all(hit.itm is None and hit.score == hit.itc for hit in hits)


def test_reranked_hits_have_the_models_itm(indexed, plain):
    model, txt, paths, images = plain
    scores = model.match(images, txt(TEXT))
    hits = indexed.search(TEXT, top=100, rerank=8, where=PICTURES)
    order = scores.itc[:, 0].argsort(descending=True)
    best = {str(paths[i]): i for i in order[:8].tolist()}
    assert {hit.path for hit in hits[:8]} == best.keys()
    for hit in hits[:8]:
        i = best[hit.path]
        assert hit.itm == pytest.approx(float(scores.itm[i, 0]), rel=1e-3, abs=1e-6)
        assert hit.score == pytest.approx(float(scores.itm_logits[i, 0, 1] + scores.itc[i, 0]), abs=1e-4)
    assert [hit.score for hit in hits[:8]] == sorted((hit.score for hit in hits[:8]), reverse=True)
    assert [hit.path for hit in hits[8:]] == [str(paths[i]) for i in order[8:].tolist()]
    assert all(hit.itm is None for hit in hits[8:])
    weighted = indexed.search(TEXT, rerank=8, itc_weight=15, where=PICTURES)
    for hit in weighted[:8]:
        i = best[hit.path]
        assert hit.score == pytest.approx(float(scores.itm_logits[i, 0, 1] + 15 * scores.itc[i, 0]), abs=1e-3)
    assert [hit.score for hit in weighted[:8]] == sorted((hit.score for hit in weighted[:8]), reverse=True)


def test_texts_and_pictures_are_added_and_subtracted(indexed, plain):
    model, txt, paths, images = plain
    texts = [txt(one) for one in ("a red star", "a white backdrop", "a blue circle")]
    pictures, [star, white, circle] = features(model, images, texts)
    asked = normalised(star + white + pictures[3] - circle)
    hits = indexed.search(
        "a red star", paths[3], plus="a white backdrop", minus=["a blue circle"], top=5, rerank=3, where=PICTURES
    )
    scores = pictures @ asked
    for hit in hits:
        assert hit.itc == pytest.approx(float(scores[paths.index(Path(hit.path))]), abs=1e-5)
    logits = model.match(images, texts).itm_logits
    for hit in hits[:3]:
        one = logits[paths.index(Path(hit.path))]
        chosen = one[0, 1] + one[1, 1] + one[2, 0]
        assert hit.score == pytest.approx(float(chosen) + hit.itc, abs=1e-4)
        p = one.softmax(dim=1)
        assert hit.itm == pytest.approx(float(p[0, 1] * p[1, 1] * p[2, 0]), rel=1e-3, abs=1e-6)
    [first] = indexed.search(image=paths[7], top=1)
    assert first.path == str(paths[7]) and first.itm is None and first.itc == pytest.approx(1, abs=1e-5)


def test_clips_are_matched_with_all_their_frames(indexed, plain, made):
    model, txt, _, _ = plain
    clip = indexed.model.read(made / "clips/0.mp4")
    assert clip.shape == (3, 8, 48, 48)
    scores = model.match(clip.unsqueeze(0), txt(TEXT))
    hits = indexed.search(TEXT, where="kind = 'clip'")
    [hit] = [hit for hit in hits if hit.path.endswith("0.mp4")]
    assert len(hits) == 2 and hit.kind == "clip"
    assert hit.itc == pytest.approx(float(scores.itc[0, 0]), abs=1e-5)
    assert hit.itm == pytest.approx(float(scores.itm[0, 0]), rel=1e-3, abs=1e-6)
    assert indexed.search(image=made / "clips/1.mp4", top=1)[0].path.endswith("1.mp4")


def test_conditions(indexed):
    assert {Path(hit.path).parent.name for hit in indexed.search(TEXT, where="path LIKE 'clips/%'")} == {"clips"}
    assert indexed.search(TEXT, where="size < 0") == []
    with pytest.raises(AuroraError, match="where: 'shape = 3' cannot be used .*kind = 'clip'"):
        indexed.search(TEXT, where="shape = 3")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "nothing to search for"),
        ({"text": "!.!"}, "text: '!.!' cannot be used"),
        ({"minus": "a star"}, "nothing to search for"),
        ({"text": "a star", "minus": "a star"}, "nothing is left of"),
        ({"image": "absent.jpg"}, "cannot read absent.jpg"),
        ({"text": "a star", "top": 0}, "top: 0"),
        ({"text": "a star", "rerank": -1}, "rerank: -1"),
    ],
)
def test_queries_that_cannot_be_used(indexed, query, message):
    with pytest.raises(AuroraError, match=message):
        indexed.search(**query)


def test_a_text_that_is_cut_is_said(indexed, caplog):
    indexed.search("a star " * 16 + "a", rerank=0)
    assert caplog.text == ""
    indexed.search("a star " * 17, rerank=0)
    assert "36 tokens, the model reads the first 35 alone" in caplog.text


def test_files_that_are_gone_or_changed_are_said(open_index, gallery, caplog):
    index = open_index()
    index.update()
    first, second = (Path(hit.path) for hit in index.search(TEXT, top=2))
    first.unlink()
    shutil.copy(gallery / "shapes/00000.jpg", second)
    with caplog.at_level(logging.WARNING):
        hits = index.search(TEXT, top=100)
    assert str(first) not in {hit.path for hit in hits} and len(hits) == 25
    assert "1 files found cannot be read any more" in caplog.text
    assert "1 files found have changed since" in caplog.text


@pytest.mark.slow
def test_side_by_side_as_one_by_one(indexed):
    colors = ("red", "blue", "green", "cyan", "pink")
    texts = [f"a {size} {color} star" for size in ("big", "small") for color in colors]
    alone = [indexed.search(text, rerank=5) for text in texts]
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(lambda text: indexed.search(text, rerank=5), texts * 2)) == alone * 2


def test_tokens_are_kept_within_their_budget(indexed, monkeypatch):
    ranker = indexed._ranker
    indexed.search(TEXT, rerank=20)
    one = next(iter(ranker._tokens.values())).nbytes
    monkeypatch.setattr(ranker, "_tokens", type(ranker._tokens)())
    monkeypatch.setattr(ranker, "_left", 3.5 * one)
    expected = indexed.search(TEXT, rerank=20, where=PICTURES)
    assert len(ranker._tokens) == 3
    read = []
    reader = indexed.model.read
    monkeypatch.setattr(indexed.model, "read", lambda path: read.append(path) or reader(path))
    assert indexed.search(TEXT, rerank=20, where=PICTURES) == expected and len(read) == 20
    read.clear()
    indexed.search(TEXT, rerank=1, top=1, where=PICTURES)
    indexed.search(TEXT, rerank=1, top=1, where=PICTURES)
    assert len(read) == 1


# What it is bound to


def test_a_folder_without_an_index(tmp_path, made):
    pytest.importorskip("lancedb", exc_type=ImportError)
    with pytest.raises(AuroraError, match="no such folder"):
        PictureIndex(tmp_path / "absent")
    with pytest.raises(AuroraError, match="has no index; make it by update"):
        PictureIndex(made, tmp_path / "new", model_type="tiny").search(TEXT)
    assert not (made / ".aurora_index").exists()


def test_without_the_engine(monkeypatch, made):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(AuroraError, match=r'pip install "lavis-aurora\[search\]"'):
        PictureIndex(made)


def test_an_index_goes_on_with_its_own_model_and_refuses_others(gallery, tmp_path):
    pytest.importorskip("lancedb", exc_type=ImportError)
    weights = package_file("configs/models/tiny/model.safetensors")
    adapter = tmp_path / "adapter"
    save_adapter(activate(tiny_model(pretrained=weights, mode_approx={"rank": 4})), adapter)
    index = PictureIndex(gallery, adapter=adapter)
    index.update()
    expected = index.search(TEXT)
    again = PictureIndex(gallery)
    assert again.model.identity["adapter"] != "none" and again.search(TEXT) == expected

    changed = tmp_path / "changed"
    save_adapter(activate(tiny_model(pretrained=weights, mode_approx={"rank": 4}), seed=1), changed)
    with pytest.raises(AuroraError, match=r"is of another model \(adapter \w{12} there and \w{12} here\)"):
        PictureIndex(gallery, adapter=changed)
    with pytest.raises(AuroraError, match=r"frames 8 there and 4 here"):
        PictureIndex(gallery, frames=4)

    adapter.rename(tmp_path / "moved")
    with pytest.raises(AuroraError, match="which is no file here; say where it is by --adapter"):
        PictureIndex(gallery)
    found = PictureIndex(gallery, adapter=tmp_path / "moved")
    assert found.search(TEXT) == expected
    found.update()
    assert PictureIndex(gallery).search(TEXT) == expected


def test_an_index_of_packaged_files_is_used_after_the_package_has_moved(gallery):
    pytest.importorskip("lancedb", exc_type=ImportError)
    index = PictureIndex(gallery, adapter=package_file("configs/models/tiny/adapter"))
    index.update()
    store = store_module.Store(index.place)
    said = store.settings()
    adapter = said["source"]["adapter"] = "/old/lavis_aurora/configs/models/tiny/adapter"
    store.write_settings(said)
    assert PictureIndex(gallery).search(TEXT) == index.search(TEXT)
    said["source"]["adapter"] = f"{adapter}/x"
    store.write_settings(said)
    with pytest.raises(AuroraError, match="/x, which is no file here; say where it is by --adapter"):
        PictureIndex(gallery)


def test_another_backbone_is_refused_heads_too(gallery, open_index, tmp_path):
    open_index().update()
    for change in ("visual_encoder.norm.weight", "text_proj.weight"):
        other = tiny_model(pretrained=package_file("configs/models/tiny/model.safetensors"))
        other.state_dict()[change].mul_(2)
        torch.save(other.state_dict(), tmp_path / "other.pth")
        with pytest.raises(AuroraError, match=r"is of another model \(backbone "):
            PictureIndex(gallery, pretrained=tmp_path / "other.pth")


def test_another_backbone_of_a_process_that_made_the_index_meanwhile_is_refused(open_index, model):
    """Both were opened where there was none: the entries of the one are not the other's."""
    first, second = open_index(), open_index()
    second.model = copy(model)
    second.model.identity = {**model.identity, "backbone": "other"}
    second.update()
    with pytest.raises(AuroraError, match=r"is of another model \(backbone other there"):
        first.update()
    with pytest.raises(AuroraError, match="no index"):
        first.search(TEXT)
    assert second.update().changes == 0, "as it was"


def test_another_folder_is_refused_a_moved_one_is_not(open_index, gallery, made, tmp_path):
    index = tmp_path / "index"
    open_index(gallery, index).update()
    with pytest.raises(AuroraError, match="is of .*gallery, not .*made"):
        open_index(made, index)
    gallery.rename(tmp_path / "renamed")
    done = open_index(tmp_path / "renamed", index).update()
    assert done.unchanged == 26 and done.changes == 0
    assert open_index(index).search(TEXT)[0].path.startswith(str(tmp_path / "renamed"))


def test_a_damaged_index_is_one_line(open_index, gallery):
    index = open_index()
    index.update()
    for file in (gallery / ".aurora_index/entries.lance").rglob("*.lance"):
        file.write_bytes(b"x")
    with pytest.raises(AuroraError, match="cannot be used") as caught:
        index.search(TEXT)
    assert "\n" not in str(caught.value)


def test_one_process_updates_at_a_time(open_index, gallery):
    index = open_index()
    index.update()
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    path = gallery / ".aurora_index/index.lock"
    with subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(AuroraError, match="is being updated by another process"):
            index.update()
        assert index.search(TEXT)
        other.communicate(b"\n")
    assert index.update().unchanged == 26


def grown(index, monkeypatch):
    """Made-up entries around the true ones in an index, and 1,000 as the limit of exact search."""
    index.update()
    rng = np.random.default_rng(0)
    centres = np.stack([entry.feature for entry in index._store.nearest(np.zeros(64, np.float32), 26)])
    weights = rng.standard_normal((2000, 26)).astype(np.float32)
    features = weights @ centres
    index._store.put(
        [Entry(f"made_up/{i}.jpg", PICTURE, FileState(0, 0, f"{i}"), normalised(x)) for i, x in enumerate(features)]
    )

    def with_made_up(*args):  # they stay: their folder cannot be looked into
        return look_through(*args)._replace(unreadable={"made_up": "no"})

    monkeypatch.setattr(index_module, "look_through", with_made_up)
    monkeypatch.setattr(index_module, "EXACT", 1000)
    monkeypatch.setattr(store_module, "PART", 256)
    return [f"made_up/{i}.jpg" for i in range(2000)], np.stack([normalised(x) for x in features])


@pytest.mark.filterwarnings("error:The create_index:DeprecationWarning")
def test_of_many_entries_an_approximate_index_whose_recall_is_measured(open_index, gallery, monkeypatch):
    index = open_index()
    paths, features = grown(index, monkeypatch)
    probed = []
    nearest = index._store.nearest

    def counted(query, count, where=None, probes=None):
        probed.append(probes)
        return nearest(query, count, where, probes)

    monkeypatch.setattr(index._store, "nearest", counted)
    index.update()
    assert len(index) == 2026 and 0.95 <= index.recall <= 1 and index._settings.probes >= 8
    queries = index._measuring_queries()
    right = 0
    for query in queries:
        true = {paths[i] for i in np.argsort(-features @ query)[:10]}
        right += len(true & {entry.path for entry in nearest(query, 12, None, index._settings.probes)})
    assert right / (10 * len(queries)) > 0.85  # true ones of the gallery are not among these
    index.search(TEXT, top=3)
    assert probed[-1] == index._settings.probes
    index.search(TEXT, top=3, where="size > 0")
    assert probed[-1] is None
    assert open_index().recall == index.recall


def test_an_approximate_index_that_finds_too_little_is_not_used(open_index, gallery, monkeypatch):
    index = open_index()
    grown(index, monkeypatch)
    monkeypatch.setattr(index_module, "RECALL", 1.01)
    index.update()
    assert index._settings.probes is None and index.recall == 1
    build = []
    monkeypatch.setattr(index._store, "build_index", build.append)
    index.update()
    assert build == []


def test_threads_of_one_process_may_update_and_search(open_index):
    index = open_index()
    index.update()
    errors = []

    def run(action):
        try:
            for _ in range(3):
                action()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in (index.update, lambda: index.search(TEXT, top=3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
