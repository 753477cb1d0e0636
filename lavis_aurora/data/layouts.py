"""Annotation files in the layouts they are published in, read as rows; :data:`LAYOUTS` is the table of them.

What a file is, is told by its content: json, json lines (whatever its name ends in), csv, or a name in each line.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lavis_aurora.common.errors import AuroraError, did_you_mean, shown
from lavis_aurora.common.files import regular

# Usual keys; the first that an entry has counts, names of files before numbers.
VIDEOS = ("video", "clip_name", "video_name", "video_id")
ITEMS = (*VIDEOS, "filename", "file_name", "image_name", "image", "image_id")
TEXTS = ("caption", "captions", "sentence", "sentences", "raw", "description", "text", "comment")
QUESTION = ("question", "answer")
SPLITS = {"train": "train", "restval": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validate", "validation", "dev"), "val"
)
# BLIP's text processors drop these of captions and questions.
PUNCTUATION = '.!"()*#:;~'


def is_visible(character: str) -> bool:
    """Whether BERT's tokenizer keeps a character: neither blank nor invisible (a zero-width space), nor an accent."""
    kind = unicodedata.category(character)
    return kind[0] not in "CZ" and kind != "Mn" and character != "\ufffd"


def has_words(value: Any) -> bool:
    """Whether anything is left of a caption or question for the model to read."""
    return isinstance(value, str) and any(c not in PUNCTUATION and is_visible(c) for c in value)


class Row(NamedTuple):
    """What a file says of one picture or video.

    Attributes:
        item: its name, as the file has it.
        texts: its captions; none where names are only listed.
        split: train, val or test, where the row says it.
        question: empty unless it is video question answering.
        answer: likewise.
        number: of the question.
    """

    item: str
    texts: tuple[str, ...] = ()
    split: str = ""
    question: str = ""
    answer: str = ""
    number: int | str = 0


class Layout(NamedTuple):
    """How files of one kind hold their rows.

    Attributes:
        name: for messages.
        holds: whether content is of this kind; the first of :data:`LAYOUTS` counts.
        rows: of content; the path is for messages.
        kind: "whole", a file holds pictures of any split, whatever its name; "part", those of one split, unless its
            rows say; "list", names alone.
    """

    name: str
    holds: Callable[[Any], bool]
    rows: Callable[[Any, Path], Iterator[Row]]
    kind: str


class Annotations(NamedTuple):
    """A file that was read; keys are those of its first entry, in order."""

    path: Path
    layout: Layout
    rows: list[Row]
    keys: tuple[str, ...] = ()


def _get(item: Any, key: str, path: Path, what: str) -> Any:
    if not isinstance(item, dict) or key not in item:
        near = did_you_mean(key, map(str, item)) if isinstance(item, dict) and item else ""
        raise AuroraError(f"{path}: {what} has no {key!r}{near}")
    return item[key]


def _first(entry: Any, names: Sequence[str], path: Path, what: str) -> Any:
    """The value of the first of the names that an entry has."""
    known = entry if isinstance(entry, dict) else {}
    for name in names:
        if known.get(name) is not None:
            return known[name]
    keys = ", ".join(map(shown, known)) or shown(entry)
    raise AuroraError(f"{path}: {what} has none of {', '.join(names)}; it has {keys}")


def _list(value: Any, path: Path, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise AuroraError(f"{path}: {what} must be a list, not {shown(value)}")
    return value


def _name(value: Any, path: Path, what: str) -> str:
    if type(value) not in (str, int) or not str(value).strip():
        raise AuroraError(f"{path}: {what} must be a text or a number, not {shown(value)}")
    return str(value).strip()


def _texts(value: Any, path: Path, what: str) -> tuple[str, ...]:
    """One text, several, or several entries with a text each; those without words are left out."""
    if isinstance(value, str) and value.startswith("["):
        value = _cell(value, path, what)
    texts = []
    for one in value if isinstance(value, list) else [value]:
        text = _first(one, ("raw", *TEXTS), path, what) if isinstance(one, dict) else one
        if not isinstance(text, str):
            raise AuroraError(f"{path}: a text of {what} must be a string, not {shown(text)}")
        texts.append(text.strip())
    return tuple(filter(has_words, texts))


def _cell(value: str, path: Path, what: str) -> Any:
    """The list that a cell of a csv may hold, as json or as Python shows it."""
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value  # a caption that begins so
    if repr(found) != value:  # numpy's arrays have no commas: Python would join their texts to one
        raise AuroraError(f"{path}: {what} has a list without commas, {shown(value)}; save it as json")
    return found


def _split(value: Any, path: Path, what: str) -> str:
    name = SPLITS.get(str(value).strip().lower())
    if name is None:
        raise AuroraError(f"{path}: the split of {what} is {shown(value)}{did_you_mean(str(value), SPLITS)}")
    return name


def _flat(content: list[Any], path: Path) -> Iterator[Row]:
    """Entries with the usual keys, for a caption each, for several, or for a question."""
    for i, entry in enumerate(content):
        what = f"entry {i}"
        item = _name(_first(entry, ITEMS, path, what), path, what)
        split = _split(entry["split"], path, what) if entry.get("split") else ""
        if "question" not in entry:
            yield Row(item, _texts(_first(entry, TEXTS, path, what), path, what), split)
            continue
        question, answer = (_name(_get(entry, key, path, what), path, f"{key} of {what}") for key in QUESTION)
        yield Row(item, (), split, question, answer, entry.get("question_id", entry.get("id", i)))


def _names(content: list[Any], path: Path) -> Iterator[Row]:
    """A list of names or numbers; of a line, the first word."""
    for i, entry in enumerate(content):
        value = _first(entry, ITEMS, path, f"entry {i}") if isinstance(entry, dict) else entry
        yield Row(_name(value, path, f"entry {i}").split()[0])


def _split_lists(content: dict[str, Any], path: Path) -> Iterator[Row]:
    for split, names in content.items():
        for row in _names(_list(names, path, split), path):
            yield row._replace(split=_split(split, path, "a list"))


def _videos_and_sentences(content: dict[str, Any], path: Path) -> Iterator[Row]:
    texts: dict[Any, list[str]] = defaultdict(list)
    for i, sentence in enumerate(_list(_get(content, "sentences", path, "the file"), path, "sentences")):
        what = f"sentence {i}"
        texts[_get(sentence, "video_id", path, what)] += _texts(_get(sentence, "caption", path, what), path, what)
    for i, video in enumerate(_list(_get(content, "videos", path, "the file"), path, "videos")):
        name = _get(video, "video_id", path, f"video {i}")
        yield Row(str(name), tuple(texts[name]), _split(_get(video, "split", path, f"video {i}"), path, f"video {i}"))


def _images_and_annotations(content: dict[str, Any], path: Path) -> Iterator[Row]:
    texts: dict[Any, list[str]] = defaultdict(list)
    for i, one in enumerate(_list(_get(content, "annotations", path, "the file"), path, "annotations")):
        what = f"annotation {i}"
        texts[_get(one, "image_id", path, what)] += _texts(_get(one, "caption", path, what), path, what)
    images = _list(content.get("images") or [], path, "images")
    files = {_get(image, "id", path, f"image {i}"): image.get("file_name") for i, image in enumerate(images)}
    folder = re.search(r"(?:train|val)20\d\d", path.name)  # COCO's pictures lie in one for each of its files
    for number in files or texts:
        file = files.get(number)
        yield Row(f"{folder[0]}/{file}" if file and folder else str(file or number), tuple(texts[number]))


def _karpathy(content: dict[str, Any], path: Path) -> Iterator[Row]:
    name = _get(content, "dataset", path, "the file")
    if name not in ("coco", "flickr30k"):
        raise AuroraError(f"{path}: holds {shown(name)}; known: coco, flickr30k")
    for i, image in enumerate(_list(_get(content, "images", path, "the file"), path, "images")):
        what = f"image {i}"
        # LAVIS's scripts put the pictures there.
        folder = _get(image, "filepath", path, what) if name == "coco" else "flickr30k-images"
        texts = _texts(_list(_get(image, "sentences", path, what), path, f"sentences of {what}"), path, what)
        split = _split(_get(image, "split", path, what), path, what)
        yield Row(f"{folder}/{_get(image, 'filename', path, what)}", texts, split)


def _keys(content: Any) -> dict[str, Any]:
    """Keys of the file, or of its first entry, in order."""
    first = content[0] if isinstance(content, list) and content else content
    return dict.fromkeys(first) if isinstance(first, dict) else {}


def _with(*keys: str) -> Callable[[Any], bool]:
    return lambda content: isinstance(content, dict) and not content.keys().isdisjoint(keys)


def _entries(*kinds: Sequence[str]) -> Callable[[Any], bool]:
    """Whether it is a list of entries that have one key of each kind."""
    return lambda content: isinstance(content, list) and all(_keys(content).keys() & set(kind) for kind in kinds)


def _splits(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and content.keys() <= SPLITS.keys()


def _columns(content: Any) -> bool:
    """Whether it is a table by columns: lists of values, or pandas' values by number."""
    known = {*ITEMS, *TEXTS, *(f"{media}s" for media in ("video", "image"))}
    if not isinstance(content, dict) or len(content) < 2 or known.isdisjoint(content):
        return False
    lists = all(isinstance(one, list) and one and not isinstance(one[0], dict) for one in content.values())
    return lists or all(isinstance(one, dict) and one and all(map(str.isdigit, one)) for one in content.values())


LAYOUTS = (
    Layout("videos and sentences", _with("videos", "sentences"), _videos_and_sentences, "whole"),
    Layout("images and annotations", _with("annotations"), _images_and_annotations, "whole"),
    Layout("Karpathy's images", _with("images", "dataset"), _karpathy, "whole"),
    Layout("lists of names by split", _splits, _split_lists, "list"),
    Layout("questions about videos", _entries(VIDEOS, ("question",)), _flat, "part"),
    Layout("captions", _entries(ITEMS, TEXTS), _flat, "part"),
    Layout("a list of names", lambda x: isinstance(x, list) and (not _keys(x) or _entries(ITEMS)(x)), _names, "list"),
)


def read_annotations(path: Path) -> Annotations:
    """Read a file in any of :data:`LAYOUTS`.

    Raises:
        AuroraError: it cannot be read, or is in none of them.
    """
    content = _content(path)
    layout = next((one for one in LAYOUTS if one.holds(content)), None)
    if layout is None:
        keys = ", ".join(map(shown, sorted(_keys(content)))) or shown(content)
        raise AuroraError(f"{path}: no known layout of annotations has {keys}; docs/data.md lists them all")
    rows = list(layout.rows(content, path))
    if not rows:
        raise AuroraError(f"{path}: it is empty; a file of annotations has at least one entry")
    return Annotations(path, layout, rows, tuple(_keys(content)))


def _content(path: Path) -> Any:
    try:
        text = regular(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        remedy = "; save it as UTF-8 text, as json, json lines or csv" if isinstance(error, UnicodeError) else ""
        raise AuroraError(f"{path} is not a readable file of annotations ({error}){remedy}") from error
    if not text.lstrip().startswith(("{", "[")):
        return _table(text, path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" not in str(error):
            raise AuroraError(f"{path} is not readable json ({error})") from error
        return list(_json_lines(text, path))
    if _columns(content):
        raise AuroraError(
            f"{path}: it holds columns, {', '.join(map(shown, content))}; save it as a list of entries (of pandas, "
            f'to_json(orient="records")), or as csv'
        )
    # One of json lines is json too.
    return [content] if _entries(ITEMS, (*TEXTS, "question"))([content]) else content


def _json_lines(text: str, path: Path) -> Iterator[Any]:
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise AuroraError(f"{path} is not readable json lines ({error} in line {i} of the file)") from error


def _table(text: str, path: Path) -> list[Any]:
    """Rows of a csv by the names of its columns; of a file without such names, its lines."""
    told = re.match(r"sep=(.)\r?\n", text, re.IGNORECASE)  # Excel's
    text = text[told.end() - 1 :] if told else text  # from its line break on: lines are counted
    header = text.lstrip().partition("\n")[0]
    delimiter = told[1] if told else max(",;\t|", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    names: list[str] = []
    table = []
    try:
        for cells in reader:
            if not any(map(str.strip, cells)):
                continue
            if not names:
                names = [name.strip().lower() for name in cells]
                if set(names).isdisjoint(ITEMS):
                    lines = list(filter(None, map(str.strip, text.splitlines())))
                    tokens = [re.fullmatch(r"(\S+)#\d+\t(.+)", line) for line in lines]  # Flickr30K's own file
                    if tokens[0]:
                        return [{"image": one[1], "caption": one[2]} for one in tokens if one]
                    if len(names) > 1:
                        _first(dict(zip(names, names)), ITEMS, path, "the header")
                    return lines
            elif len(cells) == 2 and names[1:] == ["comment_number", "comment"] and re.match(r"\d\s+\S", cells[1]):
                # A bar is missing in a line of Kaggle's results.csv of Flickr30K.
                table.append(dict(zip(names, (cells[0], *cells[1].split(None, 1)))))
            elif len(cells) != len(names):
                raise AuroraError(
                    f"{path}: line {reader.line_num} has {len(cells)} columns, not {len(names)}; mend it; a text "
                    f"that holds {delimiter!r} needs quotes around it"
                )
            else:
                table.append(dict(zip(names, cells)))
    except csv.Error as error:
        raise AuroraError(
            f"{path} is not a readable csv file (line {reader.line_num}: {error}); a text that holds quotes needs "
            f"quotes around it, and two for each"
        ) from error
    return table
