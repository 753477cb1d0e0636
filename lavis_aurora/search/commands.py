"""What the commands index, search and answer print, and the sheet of pictures that a search may leave."""

from __future__ import annotations

import json
import tempfile
import textwrap
import warnings
import webbrowser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lavis_aurora.common.errors import AuroraError, printable
from lavis_aurora.common.files import atomic_write
from lavis_aurora.search.answering import (
    ARCH,
    Question,
    answer_file,
    iter_answers,
    read_answer_list,
    read_questions,
)
from lavis_aurora.search.index import PictureIndex, find_places
from lavis_aurora.search.model import ModelSource, SearchModel
from lavis_aurora.search.ranking import Hit
from lavis_aurora.search.views import named_adapters, view, visual

# Files that an index names in its report; --json names all.
SHOWN = 20
COLUMNS = 5


def index(folder: str, out: str | None, retry_broken: bool, as_json: bool, **model: Any) -> str:
    """Make or update an index; what was done, as text.

    Args:
        folder, out, model: of :class:`PictureIndex`; ``out`` is its ``index``.
        retry_broken: of its ``update``.
        as_json: for programs.
    """
    found = PictureIndex(folder, out, **model)
    done = found.update(retry_broken)
    if as_json:
        return json.dumps({"index": found.place, "entries": len(found), "recall": found.recall, **asdict(done)})
    counts = ("new", "changed", "moved", "removed", "unchanged")
    said = ", ".join(f"{getattr(done, name):,} {name}" for name in counts)
    lines = [f"{found.place}: {len(found):,} pictures and clips ({said}) in {done.seconds:.1f} s"]
    if found.recall < 1:
        lines.append(f"a search finds {100 * found.recall:.1f}% of the true 10 best (approximate index, as measured)")
    if done.broken:
        lines.append(f"{len(done.broken):,} files cannot be read and are left out:")
        lines += [printable(f"  {path}: {why}") for path, why in [*done.broken.items()][:SHOWN]]
        if len(done.broken) > SHOWN:
            lines.append(f"  and {len(done.broken) - SHOWN} more; --json names all")
    return "\n".join(lines)


def search(
    place: str,
    text: str = "",
    as_json: bool = False,
    sheet: str | None = None,
    show: bool = False,
    query: dict[str, Any] | None = None,
    **model: Any,
) -> str:
    """Search an index; the hits, as text.

    Args:
        place, model: of :class:`PictureIndex`.
        text, query: of its ``search``.
        as_json: for programs.
        sheet: file of a PNG that shows the hits.
        show: open the sheet.
    """
    if sheet and Path(sheet).suffix.lower() != ".png":
        raise AuroraError(f"--sheet: {sheet} is to be a PNG; name it so that it ends in .png")
    index = PictureIndex(place, **model)
    hits = index.search(text, **(query or {}))
    lines = []
    if (sheet or show) and hits:
        path = Path(sheet) if sheet else Path(tempfile.mkdtemp(prefix="aurora_search_")) / "hits.png"
        draw_sheet(hits, path)
        lines.append(str(path))
        if show and not webbrowser.open(path.absolute().as_uri()):
            lines.append("(nothing here can show it)")
    if as_json:
        return json.dumps([asdict(hit) for hit in hits])
    width = max((len(hit.kind) for hit in hits), default=4)
    head = f"{'':>4}{'score':>8}{'ITM':>8}{'ITC':>8}{'by ITC':>8}  {'':<{width}}  file"
    rows = [
        f"{i:>3}.{hit.score:>8.3f}{'' if hit.itm is None else f'{hit.itm:.3f}':>8}{hit.itc:>8.3f}{hit.itc_rank:>8}"
        f"  {hit.kind:<{width}}  {printable(hit.path)}"
        for i, hit in enumerate(hits, 1)
    ]
    nothing = "nothing was found" if len(index) else f"the index {index.place} is empty"
    if (query or {}).get("where") and len(index):  # hits are printed with whole paths, which no condition fits
        nothing += "; in --where, kind is 'picture' or 'clip', and path begins below the folder: 'holiday/1.jpg'"
    if sheet:
        nothing += f"; {sheet} was not written"
    return "\n".join([head, *rows, *lines] if hits else [nothing])


def draw_sheet(hits: Sequence[Hit], path: Path) -> None:
    """A PNG with the pictures of hits, or the middle frames of clips, under their place and scores.

    Raises:
        AuroraError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(hits))
    rows = -(-len(hits) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for i, axis in enumerate(axes):
        axis.set_axis_off()
        if i < len(hits):
            hit = hits[i]
            axis.imshow(visual(hit.path))
            itm = "" if hit.itm is None else f"ITM {hit.itm:.2f}  "
            name = textwrap.shorten(printable(Path(hit.path).name), 28, placeholder="...")
            axis.set_title(f"{i + 1}.  {itm}ITC {hit.itc:.2f}\n{name}", fontsize=8, parse_math=False)
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")  # of names in scripts that the font has not: boxes stand there
        figure.savefig(file, format="png", dpi=110)


def answer(
    questions: Sequence[str],
    image: str | None = None,
    images: str | None = None,
    answers: str | None = None,
    out: str | None = None,
    as_json: bool = False,
    device: str = "auto",
    **model: Any,
) -> str:
    """Answer questions; the answers or what was written, as text.

    Args:
        questions: about ``image``; without one, a file.
        image: a picture or clip.
        images: the folder of the pictures that a file names.
        answers: json list to choose from; without one, answers are generated.
        out: of :func:`answer_file`, for a file of questions.
        as_json: for programs.
        device: of :class:`SearchModel`.
        model: of :class:`ModelSource`.
    """
    choice = None if answers is None else read_answer_list(answers)
    if image is None and len(questions) != 1:
        raise AuroraError("answer takes one file of questions, or --image and questions about it")
    if image is not None and out is not None:
        raise AuroraError("--out: is for a file of questions; the answers about one --image are printed")
    asked = [Question(i, Path(image), text) for i, text in enumerate(questions)] if image is not None else []
    if image is None and not Path(questions[0]).is_file():
        raise AuroraError(f"no such file of questions: {questions[0]}; to ask about one picture, add --image FILE")
    asked = asked or read_questions(questions[0], images)
    loaded = SearchModel(ARCH, ModelSource(**model).absolute(), device)
    if image is None:
        found = answer_file(loaded, asked, out or "answers.json", choice)
        broken = sum(bool(one.why) for one in found)
        return f"{out or 'answers.json'}: {len(found) - broken:,} answers" + f", {broken:,} left out" * bool(broken)
    found = [one for batch in iter_answers(loaded, asked, choice) for one in batch]
    if found[0].why:
        raise AuroraError(f"cannot read {image} ({found[0].why})")
    if as_json:
        return json.dumps([{key: getattr(one, key) for key in ("question", "answer", "confidence")} for one in found])
    return "\n".join(f"{one.answer}  ({one.confidence:.2f})  {one.question}" for one in found)


def check_page(index: str | None, adapters: Sequence[str]) -> None:
    """Refuse what the page could not show, before it is served.

    Args:
        index: an index or the folder that it is in; None for the demo.
        adapters: of :func:`named_adapters`.
    """
    if index is not None:
        find_places(index, None)
    for name, folder in named_adapters(adapters).items():
        view(name, folder)
