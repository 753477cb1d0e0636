"""LAVIS's datasets open pictures themselves; what their processors are given is what a viewer shows, or an error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lavis.datasets.datasets.aok_vqa_datasets import AOKVQADataset, AOKVQAEvalDataset
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.datasets.datasets.caption_datasets import CaptionDataset, CaptionEvalDataset
from lavis.datasets.datasets.coco_caption_datasets import COCOCapEvalDataset, NoCapsEvalDataset
from lavis.datasets.datasets.coco_vqa_datasets import COCOVQADataset, COCOVQAEvalDataset
from lavis.datasets.datasets.dialogue_datasets import DialogueDataset, DialogueEvalDataset
from lavis.datasets.datasets.gqa_datasets import GQADataset, GQAEvalDataset
from lavis.datasets.datasets.image_text_pair_datasets import ImageTextPairDataset
from lavis.datasets.datasets.imagefolder_dataset import ImageFolderDataset
from lavis.datasets.datasets.nlvr_datasets import NLVRDataset, NLVREvalDataset
from lavis.datasets.datasets.retrieval_datasets import RetrievalDataset, RetrievalEvalDataset
from lavis.datasets.datasets.snli_ve_datasets import SNLIVisualEntialmentDataset
from lavis.datasets.datasets.vg_vqa_datasets import VGVQADataset
from PIL import Image, ImageFile
from tiny import project_yaml
from torch.utils.data import DataLoader

from lavis_aurora.common import media
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.media import load_picture
from lavis_aurora.data.annotations import build_checked
from lavis_aurora.data.samples import CheckedDataset
from lavis_aurora.project import load_config

ANSWERS = {"answer": ["red"], "direct_answers": ["red"], "choices": ["red"], "correct_choice_idx": 0}
TURNS = [{"question": "which?", "answer": "red"}] * 2
ENTRY = {
    "image": "a.png",
    "images": ["a.png", "b.jpg"],
    "caption": "red",
    "sentence": "red",
    "question": "which?",
    "question_id": 1,
    "image_id": "5",
    "label": "neutral",
    "img_id": "5",
    **ANSWERS,
}
ONE = {name: value for name, value in ENTRY.items() if name != "images"}
KINDS: dict[type[BaseDataset], object] = {
    RetrievalDataset: [ONE],
    RetrievalEvalDataset: [{**ONE, "caption": ["red"]}],
    CaptionDataset: [ONE],
    CaptionEvalDataset: [ONE],
    COCOCapEvalDataset: [{**ONE, "image": "x/a_5.png"}],
    NoCapsEvalDataset: [ONE],
    ImageTextPairDataset: [ONE],
    COCOVQADataset: [ONE],
    COCOVQAEvalDataset: [ONE],
    VGVQADataset: [{**ONE, "answer": "red"}],
    GQADataset: [{**ONE, "answer": "red"}],
    GQAEvalDataset: [{**ONE, "answer": "red"}],
    AOKVQADataset: [ONE],
    AOKVQAEvalDataset: [ONE],
    SNLIVisualEntialmentDataset: [{**ONE, "image": "c"}],
    NLVRDataset: [{**ENTRY, "label": "True"}],
    NLVREvalDataset: [{**ENTRY, "label": "True"}],
    DialogueDataset: {"dialogs": [{**ONE, "dialog": TURNS}]},
    DialogueEvalDataset: {"dialogs": [{**ONE, "dialog": TURNS}]},
}


def glass(size: tuple[int, int] = (16, 8)) -> Image.Image:
    """Red, and on the right half transparent over black."""
    picture = Image.new("RGBA", size, (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (size[0] // 2, 0, *size))
    return picture


def turned(path: Path, orientation: int = 3) -> None:
    """White on the left, and on the right what :func:`glass` has there; to be turned by 180 degrees."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("RGB", (16, 8), "white")
    picture.paste((255, 0, 0), (8, 0, 16, 8))
    picture.save(path, exif=exif, quality=95, subsampling=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures that are red on the left and white on the right, to those who look."""
    root = tmp_path / "images"
    (root / "x").mkdir(parents=True)
    for name in ("a.png", "c.jpg", "x/a_5.png"):
        glass().save(root / name, format="PNG")
    turned(root / "b.jpg")
    return root


def made(kind: type[BaseDataset], folder: Path, annotations: object) -> CheckedDataset:
    file = folder.parent / "annotations.json"
    file.write_text(json.dumps(annotations))
    (folder.parent / "answers.json").write_text('["red"]')
    files = [str(file), str(folder.parent / "answers.json")]
    rest = files if kind in (COCOVQAEvalDataset, GQAEvalDataset, AOKVQAEvalDataset) else files[:1]
    return CheckedDataset(kind(np.asarray, str, str(folder), rest), "mine")


def pictures_of(sample: dict) -> list[np.ndarray]:
    return [value for value in sample.values() if isinstance(value, np.ndarray)]


def is_as_seen(pixels: np.ndarray) -> bool:
    expected = np.asarray(glass().convert("RGB")) + np.where(np.arange(16) < 8, 0, 255)[None, :, None]
    return pixels.shape == (8, 16, 3) and bool((np.abs(pixels - expected.astype(int)) < 60).all())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_dataset_of_lavis_is_given_what_is_seen(folder: Path, kind: type[BaseDataset]) -> None:
    dataset = made(kind, folder, KINDS[kind])
    pictures = pictures_of(dataset[0])
    assert len(pictures) == (2 if issubclass(kind, NLVRDataset) else 1)
    assert all(is_as_seen(pixels) for pixels in pictures)


def test_a_folder_of_classes(folder: Path) -> None:
    dataset = CheckedDataset(ImageFolderDataset(np.asarray, str(folder)), "mine")
    assert len(dataset) == 1 and is_as_seen(dataset[0]["image"])


@pytest.mark.parametrize("second", ["missing", "half"])
def test_of_two_pictures_both_are_named(folder: Path, second: str) -> None:
    dataset = made(NLVRDataset, folder, KINDS[NLVRDataset])
    data = (folder / "b.jpg").read_bytes()
    (folder / "b.jpg").unlink()
    if second == "half":
        (folder / "b.jpg").write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(AuroraError, match=f"^mine: cannot read {folder}/a.png, {folder}/b.jpg \\("):
        dataset[0]


def test_processors_that_are_set_later_are_given_it_too(folder: Path) -> None:
    dataset = made(RetrievalDataset, folder, KINDS[RetrievalDataset])
    dataset.set_processors(lambda picture: np.asarray(picture), str)
    assert is_as_seen(dataset[0]["image"])
    assert isinstance(dataset.inner.vis_processor, type(lambda: None))


def test_a_plain_picture_is_lavis_s_own_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (16, 8, 3), dtype=np.uint8)).save(folder / "a.png")
    turned(folder / "c.jpg", orientation=1)
    read = []
    monkeypatch.setattr(media, "read_picture", read.append)
    for name in ("a.png", "c.jpg", "b.jpg"):
        dataset = made(RetrievalDataset, folder, [{**ONE, "image": name}])
        pixels = dataset[0]["image"]
        with Image.open(folder / name) as opened:
            expected = np.asarray(opened.convert("RGB"))
        assert (pixels == (expected if name != "b.jpg" else expected[::-1, ::-1])).all()
    assert not read


# Through the whole of a project, and in the processes of a loader


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return project_yaml(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_half_a_file_is_refused_although_lavis_allows_it(project: Path, workers: int) -> None:
    """LAVIS would fill the lower half of this JPEG with grey."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    path = project.parent / "data" / "images" / "train" / "002.jpg"
    Image.effect_noise((200, 200), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    train = build_checked("coco_retrieval", load_config(str(project), []).datasets_cfg.coco_retrieval)["train"]
    loader = DataLoader(train, batch_size=1, num_workers=workers, collate_fn=train.collater)
    with pytest.raises(
        AuroraError, match=f"coco_retrieval train: cannot read {path} \\(OSError: .*truncated.*; replace it"
    ):
        list(loader)


def test_16_bits_are_known_by_content_and_not_by_name(project: Path) -> None:
    path = project.parent / "data" / "images" / "val" / "001.jpg"
    Image.fromarray(np.full((8, 8), 20000, np.uint16)).save(path, format="PNG")
    val = build_checked("coco_retrieval", load_config(str(project), []).datasets_cfg.coco_retrieval)["val"]
    val.set_processors(np.asarray, str)
    assert (val[1]["image"] == 78).all() and (np.asarray(load_picture(path)) == 78).all()
