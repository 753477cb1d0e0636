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
from PIL import Image

from lavis_aurora.analysis.examples import word_maps
from lavis_aurora.common.errors import AuroraError, printable
from lavis_aurora.common.media import load_picture
from lavis_aurora.common.paths import package_file
from lavis_aurora.search.answering import ARCH as ANSWERS
from lavis_aurora.search.index import PictureIndex
from lavis_aurora.search.model import ModelSource, SearchModel, Unreadable, adapter_hash
from lavis_aurora.search.ranking import Hit
from lavis_aurora.search.views import (
    FROZEN,
    View,
    demo_pictures,
    named_adapters,
    overlay,
    share_weights,
    sized,
    view,
    visual,
)

# Pixels of an upload at most: a small file may hold a huge picture.
LARGEST = 50_000_000
COLUMNS = 3
BROKEN_SHOWN = 20
UPLOADS = ["jpg", "jpeg", "png", "webp", "gif", "bmp"]
MARK = "\u2713"
# Less blank above the first line than Streamlit leaves.
STYLE = "<style>.stMainBlockContainer {padding-top: 2rem}</style>"
# Of the demo; one whose picture both models find, at different places.
FIRST_CAPTION = 3
DEMO = (
    "The demo: a tiny BLIP, pretrained on clean pictures of shapes, meets pictures of another look and captions of "
    "other words. frozen is the model as it was; tuned has an adapter from the first of four epochs on 3,200 "
    "pictures of that look, none of which is shown here."
)


@dataclass(frozen=True)
class Views:
    """What a page shows.

    Attributes:
        indexes: of the backbone or adapter of the index first, then of each adapter of retrieval, by name.
        views: of all adapters by name, those of answers too.
        captions: of the demo's pictures, with the file of each; none of one's own pictures.
    """

    indexes: dict[str, PictureIndex]
    views: dict[str, View]
    captions: dict[str, str]

    @property
    def first(self) -> PictureIndex:
        """The index that was named."""
        return next(iter(self.indexes.values()))


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """What ``lavis-aurora app`` hands on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("index", nargs="?")
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


@st.cache_resource(show_spinner="loading the models and the index")
def load(place: str | None, given: tuple[str, ...], device: str) -> Views:
    """The index and one for each adapter of retrieval; those that are empty are made, and all of the demo.

    Args:
        place: an index or the folder that it is in; the demo without.
        given: of :func:`named_adapters`.
        device: of :class:`PictureIndex`.

    Raises:
        AuroraError: what is named cannot be used.
    """
    adapters, model_type, captions = named_adapters(given), None, dict[str, str]()
    if place is None:
        place, captions = demo_pictures()
        adapters, model_type = {"tuned": package_file("configs/models/tiny/adapter"), **adapters}, "tiny"
    views = {name: view(name, folder) for name, folder in adapters.items()}
    first = PictureIndex(place, model_type=model_type, device=device)
    own = first.model.source.adapter
    name = FROZEN if own is None else Path(own).name
    views, indexes = {name: view(name, own), **views}, {name: first}
    # Backbone and picture size as the index has them.
    source = {key: getattr(first.model.source, key) for key in ("pretrained", "tokenizer", "med_config_path")}
    for name, folder in adapters.items():
        if views[name].arch == ANSWERS:
            continue
        beside = f"{first.place}.{adapter_hash(folder)[:12]}"
        indexes[name] = PictureIndex(first.root, beside, adapter=folder, device=device, **source)
        share_weights(first.model.model, indexes[name].model.model)
    for index in indexes.values():
        if model_type is not None or not len(index):
            index.update()
    return Views(indexes, views, captions)


@st.cache_resource(show_spinner="loading a model of answers")
def answering(adapter: str | None, model_type: str | None, device: str) -> SearchModel:
    """The model that answers questions."""
    return SearchModel(ANSWERS, ModelSource(model_type=model_type, adapter=adapter), device)


def plain(text: str) -> str:
    """Text as it is, where Markdown would be read; nothing in it acts on a terminal or a page."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|<>$:~&])", r"\\\1", printable(text))


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


def show_hits(name: str, hits: Sequence[Hit], opened: Views, described: str | None, device: str) -> None:
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
                mark = f" {MARK}" if hit.path == described else ""
                lines = [f"{place}. {printable(Path(hit.path).name)}{mark}", f"ITC {hit.itc:.2f}"]
                if hit.itm is not None:
                    lines = [lines[0], f"{lines[1]}, ITM {hit.itm:.2f}", f"by ITC alone: {hit.itc_rank}."]
                st.text("\n".join(lines))
                if st.button("look closer", key=f"{name} {place}"):
                    closer_dialog(opened, hit.path, device)


def query_fields(opened: Views) -> tuple[str, str, io.BytesIO | None]:
    """The words wanted, those not wanted, and the picture that are searched for."""
    captions = [*opened.captions]
    st.session_state.setdefault("text", captions[FIRST_CAPTION % len(captions)] if captions else "")
    left, middle, right = st.columns([3, 2, 2])
    text = left.text_input("Search for", max_chars=500, key="text")
    if captions:
        left.button("another caption of the demo", on_click=_next_caption, args=(captions,), key="another")
    minus = middle.text_input("but not", max_chars=500, key="minus")
    image = uploaded(right.file_uploader("or for what is like a picture", UPLOADS, key="picture"))
    return text.strip(), minus.strip(), image


def _next_caption(captions: Sequence[str]) -> None:
    now = st.session_state.text
    following = captions.index(now) + 1 if now in captions else 0
    st.session_state.text = captions[following % len(captions)]


def search_page(opened: Views, device: str) -> None:
    """Words or a picture; what each adapter finds."""
    text, minus, image = query_fields(opened)
    if not text and image is None:
        st.info("Give words or a picture.")
        return
    names, views = [*opened.indexes], opened.views
    chosen = st.multiselect("Adapters", names, names, format_func=lambda name: views[name].label, key="adapters")
    options = st.expander("Options")
    top = options.slider("pictures", 3, 30, 6, key="top")
    rerank = options.slider("candidates reranked by ITM (0: ITC alone)", 0, 128, 32, key="rerank")
    weight = options.number_input("weight of ITC", 0.0, 100.0, 15.0 if opened.captions else 1.0, key="weight")
    described = opened.captions.get(text)
    for name, column in zip(chosen, st.columns(max(1, len(chosen)), gap="large")):
        with column:
            st.subheader(plain(views[name].label))
            try:
                hits = opened.indexes[name].search(
                    text, image, minus=minus or (), top=max(top, rerank), rerank=rerank, itc_weight=weight
                )
            except AuroraError as error:
                st.error(plain(str(error)))
                continue
            if described is not None:
                place = next((f"place {i}" for i, hit in enumerate(hits, 1) if hit.path == described), None)
                st.text(f"{MARK} the picture with this caption: {place or f'not among the best {len(hits)}'}")
            show_hits(name, hits[:top], opened, described, device)
        if image is not None:
            image.seek(0)


@st.dialog("A closer look", width="large")
def closer_dialog(opened: Views, path: str, device: str) -> None:
    """A picture that was found, over the page."""
    try:
        closer(opened, path, visual(path), printable(path), device, "found")
    except AuroraError as error:
        st.error(plain(str(error)))


def own_page(opened: Views, device: str) -> None:
    """The same of an uploaded picture."""
    given = uploaded(st.file_uploader("A picture of your own, to look at and to ask about", UPLOADS, key="own"))
    if given is not None:
        closer(opened, given, sized(load_picture(given)), "", device, "own")


def closer(opened: Views, source: Any, picture: Image.Image, name: str, device: str, key: str) -> None:
    """A picture with questions about it, and where each word of a text looks.

    Args:
        opened: what is shown.
        source: path or open file.
        picture: as it is shown.
        name: likewise.
        device: of the model of answers.
        key: begins the keys of the fields.
    """
    left, right = st.columns([1, 2])
    left.image(picture)
    left.text(name)
    with right:
        example = "how many shapes are there?" if opened.captions else None
        question = st.text_input("Ask about it", max_chars=500, key=f"{key} question", placeholder=example)
        if question.strip():
            show_answers(opened, source, question.strip(), device)
        before = st.session_state.get("text", "")
        text = st.text_input("Where do the words of a text look?", before, max_chars=500, key=f"{key} text")
        if text.strip():
            show_attention(opened.indexes, source, picture, text, key)


def show_attention(
    indexes: Mapping[str, PictureIndex], source: Any, picture: Image.Image, text: str, key: str
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
    last = len(words) - 1  # of a caption, more likely a thing than the first
    word = st.radio("word", range(len(words)), last, lambda i: plain(words[i]), horizontal=True, key=f"{key} word")
    for column, (name, (_, grids)) in zip(st.columns(max(2, len(maps))), maps.items()):
        column.image(overlay(picture, grids[last if word is None else word]))
        column.text(f"{name}: bright is where “{words[last if word is None else word]}” looks")


def show_answers(opened: Views, source: Any, question: str, device: str) -> None:
    """Answers to a question, by the plain model and by each adapter of answers."""
    first = opened.first
    model_type = "tiny" if first.model.source.model_type == "tiny" else None
    own = {name: view.adapter for name, view in opened.views.items() if name not in opened.indexes}
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
        st.text(f"{name}: {printable(answer)} (confidence {confidence:.2f})")


def _pixels(model: SearchModel, source: Any) -> torch.Tensor:
    if hasattr(source, "seek"):
        source.seek(0)
    return model.read(source)


def main(argv: Sequence[str]) -> None:
    """Draw the page."""
    args = parse_args(argv)
    st.set_page_config("Aurora", layout="wide")
    st.html(STYLE)
    st.header("Aurora: search and ask")
    try:
        opened = load(args.index, tuple(args.adapter), args.device)
    except AuroraError as error:
        st.error(plain(str(error)))
        return
    st.text(DEMO if args.index is None else f"{len(opened.first):,} pictures and clips of {_folder(opened)}")
    broken = opened.first.broken()
    if broken:
        left_out = st.expander(f"Files that cannot be read, left out: {len(broken):,}")
        left_out.text("\n".join(printable(f"{path}: {why}") for path, why in [*broken.items()][:BROKEN_SHOWN]))
    searching, own = st.tabs(["Search", "Ask about a picture of your own"])
    with searching:
        if len(opened.first):
            search_page(opened, args.device)
        else:
            st.info(plain(f"The index is empty: there is no picture or clip in {_folder(opened)}."))
    with own:
        own_page(opened, args.device)


def _folder(opened: Views) -> str:
    return printable(str(opened.first.root))


if __name__ == "__main__":
    main(sys.argv[1:])
