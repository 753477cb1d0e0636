"""The page of ``lavis-aurora app``: search and questions over an index, with several adapters side by side.

Streamlit runs this file. Only files of the index are shown, made small; uploads stay in memory.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lavis_aurora_compat  # noqa: F401

import numpy as np
import streamlit as st
import torch
from matplotlib import colormaps
from PIL import Image

from lavis_aurora.adapters.config import read_adapter
from lavis_aurora.analysis.examples import word_maps
from lavis_aurora.common.errors import AuroraError, printable
from lavis_aurora.common.media import load_picture
from lavis_aurora.common.paths import data_root, package_file
from lavis_aurora.data.samples import read_visual
from lavis_aurora.demo.pictures import generate_pictures
from lavis_aurora.search.answering import ARCH as ANSWERS
from lavis_aurora.search.index import PictureIndex
from lavis_aurora.search.model import ModelSource, SearchModel, Unreadable, adapter_hash
from lavis_aurora.search.ranking import Hit

# Pixels of a side at most, of pictures that are sent to the browser.
SHOWN_SIDE = 480
# Pixels of an upload at most: a small file may hold a huge picture.
LARGEST = 50_000_000
COLUMNS = 3
FROZEN = "frozen"
DEMO_PICTURES = 200


@dataclass
class View:
    """An index or a model of answers with one adapter.

    Attributes:
        name: as shown.
        adapter: folder; None for the backbone alone.
        parameters: of the adapter, its heads and gates among them.
        megabytes: that its file takes.
    """

    name: str
    adapter: str | None
    parameters: int
    megabytes: float

    @property
    def label(self) -> str:
        """Name, parameters and size."""
        if self.adapter is None:
            return f"{self.name} (no adapter)"
        return f"{self.name} ({self.parameters:,} parameters, {self.megabytes:.2f} MB)"


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """What ``lavis-aurora app`` hands on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("index", nargs="?")
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


def named_adapters(given: Sequence[str]) -> dict[str, str]:
    """Folders by name, from NAME=FOLDER or FOLDER.

    Raises:
        AuroraError: two have one name.
    """
    found: dict[str, str] = {}
    for one in given:
        name, _, folder = one.rpartition("=")
        name = name or Path(folder).name
        if name in found or name == FROZEN:
            raise AuroraError(f"--adapter: {name} is the name of another one; name it otherwise, as NAME={folder}")
        found[name] = folder
    return found


def demo() -> tuple[str, dict[str, str]]:
    """The demo's pictures, made on first use, and the adapter that was tuned on others of their kind."""
    folder = data_root() / "demo_app"
    if not (folder / "shifted_test.json").is_file():
        generate_pictures(folder, "shifted", {"test": DEMO_PICTURES})
    return str(folder / "images"), {"tuned": package_file("configs/models/tiny/adapter")}


@st.cache_resource(show_spinner="loading the models")
def load(place: str | None, given: tuple[str, ...], device: str) -> tuple[dict[str, PictureIndex], dict[str, View]]:
    """An index for each adapter of retrieval, by name; and all adapters, those of answers too.

    Raises:
        AuroraError: what is named cannot be used.
    """
    adapters, model_type = named_adapters(given), None
    if place is None:
        place, more = demo()
        adapters, model_type = {**more, **adapters}, "tiny"
    views, retrieval = {}, {}
    for name, folder in adapters.items():
        config, tensors = read_adapter(folder)
        count, size = sum(x.numel() for x in tensors.values()), sum(x.nbytes for x in tensors.values())
        views[name] = View(name, folder, count, size / 1e6)
        if config.model.get("arch") != ANSWERS:
            retrieval[name] = folder
    first = PictureIndex(place, model_type=model_type, device=device)
    own = first.model.source.adapter
    name = FROZEN if own is None else Path(own).name
    views = {name: _own_view(name, own), **views}
    indexes = {name: first}
    for name, folder in retrieval.items():
        beside = f"{first.place}.{adapter_hash(folder)[:12]}"
        # Backbone and picture size as the index has them.
        source = {key: getattr(first.model.source, key) for key in ("pretrained", "tokenizer", "med_config_path")}
        indexes[name] = PictureIndex(first.root, beside, adapter=folder, device=device, **source)
        share_weights(first.model.model, indexes[name].model.model)
    for index in indexes.values():
        if model_type is not None or not len(index):
            index.update()
    return indexes, views


def _own_view(name: str, adapter: str | None) -> View:
    if adapter is None:
        return View(name, None, 0, 0)
    tensors = read_adapter(adapter)[1].values()
    return View(name, adapter, sum(x.numel() for x in tensors), sum(x.nbytes for x in tensors) / 1e6)


def share_weights(kept: torch.nn.Module, other: torch.nn.Module) -> None:
    """Let ``other`` have the tensors of ``kept`` where they are equal: models of one backbone hold it once."""
    own = dict(kept.named_parameters())
    for name, parameter in other.named_parameters():
        twin = own.get(name)
        if twin is not None and twin.shape == parameter.shape and torch.equal(twin, parameter):
            parameter.data = twin.data


@st.cache_resource(show_spinner="loading a model of answers")
def answering(adapter: str | None, model_type: str | None, device: str) -> SearchModel:
    """The model that answers questions."""
    return SearchModel(ANSWERS, ModelSource(model_type=model_type, adapter=adapter), device)


def plain(text: str) -> str:
    """Text as it is, where Markdown would be read; nothing in it acts on a terminal or a page."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|<>$:~&])", r"\\\1", printable(text))


def small(picture: Image.Image) -> Image.Image:
    """A copy that is sent to the browser."""
    copy = picture.copy()
    copy.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return copy


def visual(path: str) -> Image.Image:
    """A picture, or the middle frame of a clip, made small."""
    return small(Image.fromarray(read_visual(path)))


def overlay(picture: Image.Image, grid: np.ndarray) -> Image.Image:
    """Attention of a word, (rows, columns), over a picture."""
    span = float(grid.max() - grid.min()) or 1.0
    shades = Image.fromarray((255 * (grid - grid.min()) / span).astype(np.uint8))
    shades = shades.resize(picture.size, Image.Resampling.BICUBIC)
    colors = Image.fromarray((colormaps["inferno"](np.asarray(shades))[..., :3] * 255).astype(np.uint8))
    return Image.blend(picture.convert("RGB"), colors, 0.6)


def uploaded(file: Any) -> io.BytesIO | None:
    """An upload that is a picture; what is wrong with it is said on the page."""
    if file is None:
        return None
    content = io.BytesIO(file.getvalue())
    try:
        with Image.open(content) as header:
            if header.width * header.height > LARGEST:
                raise AuroraError(f"{file.name} has more than {LARGEST:,} pixels; make it smaller")
        content.seek(0)
        load_picture(content)
    except (AuroraError, OSError, Image.DecompressionBombError) as error:
        st.error(plain(f"{file.name} cannot be used as a picture ({error})"))
        return None
    content.seek(0)
    return content


def show_hits(name: str, hits: Sequence[Hit]) -> None:
    """A grid of what was found, each with its place before and after reranking."""
    if not hits:
        st.info("Nothing was found.")
    for start in range(0, len(hits), COLUMNS):
        for column, (place, hit) in zip(st.columns(COLUMNS), enumerate(hits[start : start + COLUMNS], start + 1)):
            with column:
                try:
                    st.image(visual(hit.path))
                except AuroraError as error:
                    st.error(plain(str(error)))
                itm = "" if hit.itm is None else f"ITM {hit.itm:.2f}, "
                st.text(f"{place}. (by ITC {hit.itc_rank}.) {itm}ITC {hit.itc:.2f}\n{printable(Path(hit.path).name)}")
                if st.button("look closer", key=f"{name} {place}"):
                    st.session_state.chosen = hit.path


def search_page(indexes: Mapping[str, PictureIndex], views: Mapping[str, View], demonstrates: bool) -> None:
    """Words or a picture; what each adapter finds."""
    example = "there is a big red star at center over a black backdrop" if demonstrates else ""
    left, middle, right = st.columns([3, 2, 2])
    text = left.text_input("Search for", example, max_chars=500, key="text")
    minus = middle.text_input("but not", max_chars=500, key="minus")
    image = uploaded(right.file_uploader("or for what is like", ["jpg", "jpeg", "png", "webp", "gif", "bmp"]))
    if not text.strip() and image is None:
        st.info("Give words or a picture.")
        return
    names = [*indexes]
    chosen = st.multiselect("Adapters", names, names, format_func=lambda name: views[name].label, key="adapters")
    options = st.expander("Options")
    top = options.slider("pictures", 3, 30, 6, key="top")
    rerank = options.slider("candidates reranked by ITM (0: ITC alone)", 0, 128, 32, key="rerank")
    weight = options.number_input("weight of ITC", 0.0, 100.0, 15.0 if demonstrates else 1.0, key="weight")
    for name, column in zip(chosen, st.columns(max(1, len(chosen)))):
        with column:
            st.subheader(plain(views[name].label))
            try:
                hits = indexes[name].search(
                    text.strip(), image, minus=minus.strip() or (), top=top, rerank=rerank, itc_weight=weight
                )
            except AuroraError as error:
                st.error(plain(str(error)))
                continue
            show_hits(name, hits)
        if image is not None:
            image.seek(0)


def closer_page(indexes: Mapping[str, PictureIndex], views: Mapping[str, View], device: str) -> None:
    """The chosen picture: where each word of a text looks, and questions about it."""
    path = st.session_state.get("chosen")
    given = uploaded(st.file_uploader("a picture of your own", ["jpg", "jpeg", "png", "webp"], key="asked picture"))
    source = given if given is not None else path
    if source is None:
        st.info("Choose a picture under Search by “look closer”, or give one here.")
        return
    picture = small(load_picture(given)) if given is not None else visual(str(path))
    st.image(picture)
    if given is None:
        st.text(printable(str(path)))
    text = st.text_input("Where do the words of a text look?", st.session_state.get("text", ""), max_chars=500)
    if text.strip():
        show_attention(indexes, views, source, picture, text)
    question = st.text_input("Ask about it", max_chars=500, key="question")
    if question.strip():
        show_answers(indexes, views, source, question.strip(), device)


def show_attention(
    indexes: Mapping[str, PictureIndex], views: Mapping[str, View], source: Any, picture: Image.Image, text: str
) -> None:
    """The map of one word, by each adapter."""
    maps: dict[str, tuple[list[str], np.ndarray]] = {}
    for name, index in indexes.items():
        try:
            pixels = _pixels(index.model, source)
            frame = pixels if pixels.dim() == 3 else pixels[:, pixels.shape[1] // 2]
            with index.lock:
                words, grids, _ = word_maps(index.model.model, frame.unsqueeze(0), index.model.words(text), -1)
        except (AuroraError, Unreadable) as error:
            st.error(plain(str(error)))
            return
        maps[name] = words, grids
    words = next(iter(maps.values()))[0]
    if not words:
        return
    word = st.radio("word", range(len(words)), format_func=lambda i: plain(words[i]), horizontal=True, key="word")
    for column, (name, (_, grids)) in zip(st.columns(len(maps)), maps.items()):
        column.image(overlay(picture, grids[word or 0]))
        column.text(views[name].name)


def show_answers(
    indexes: Mapping[str, PictureIndex], views: Mapping[str, View], source: Any, question: str, device: str
) -> None:
    """Answers to a question, by the plain model and by each adapter of answers."""
    first = next(iter(indexes.values()))
    model_type = "tiny" if first.model.source.model_type == "tiny" else None
    own = {name: view.adapter for name, view in views.items() if name not in indexes}
    for name, adapter in {FROZEN: None, **own}.items():
        try:
            model = answering(adapter, None if adapter else model_type, device)
            pixels = _pixels(model, source).unsqueeze(0).to(model.model.device)
            samples = {"image" if pixels.dim() == 4 else "video": pixels, "text_input": [model.words(question)]}
            with first.lock:
                found = model.model.predict_answers(samples, inference_method="generate", return_scores=True)
        except (AuroraError, Unreadable, OSError) as error:
            st.error(plain(str(error)))
            continue
        [answer], [confidence] = found
        st.text(f"{name}: {answer} ({confidence:.2f})")


def _pixels(model: SearchModel, source: Any) -> torch.Tensor:
    if hasattr(source, "seek"):
        source.seek(0)
    return model.read(source)


def main(argv: Sequence[str]) -> None:
    """Draw the page."""
    args = parse_args(argv)
    st.set_page_config("Aurora", layout="wide")
    st.title("Aurora: search and ask")
    try:
        indexes, views = load(args.index, tuple(args.adapter), args.device)
    except AuroraError as error:
        st.error(plain(str(error)))
        return
    first = next(iter(indexes.values()))
    st.text(f"{len(first):,} pictures and clips of {printable(str(first.root))}")
    searching, closer = st.tabs(["Search", "Look closer and ask"])
    with searching:
        if len(first):
            search_page(indexes, views, args.index is None)
        else:
            st.info("The index is empty: there is no picture or clip in its folder.")
    with closer:
        closer_page(indexes, views, args.device)


if __name__ == "__main__":
    main(sys.argv[1:])
