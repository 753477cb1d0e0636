"""README.md, CONTRIBUTING.md and docs/: links and anchors resolve, and what commands name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lavis_aurora_cli import command_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"```.*?```|^    [^\n]*", re.DOTALL | re.MULTILINE)
# A link may break between its words, not in its address.
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"(?<![\w/.-])((?:projects|scripts|\.ci)/[\w./-]*\w|(?:train|evaluate|lavis_aurora_cli)\.py)")


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


COMMAND = re.compile(r"(lavis-aurora [a-z-]+|(?<![\w/])(?:train|evaluate)\.py)([^`#\n]*)")


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page, which must differ."""
    titles = re.findall(r"^#+ (.+)$", CODE.sub("", _text(page)), re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
    assert len(set(anchors)) == len(anchors), f"{page.name}: two headings are the same"
    return set(anchors)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_resolve(page: Path) -> None:
    assert _anchors(page)
    for link in LINK.findall(CODE.sub("", _text(page))):
        if re.match(r"\w+:", link):
            continue
        address, _, anchor = link.partition("#")
        target = (page.parent / address).resolve() if address else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in _anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_commands_name_is_there(page: Path) -> None:
    for name in FILE.findall(_text(page)):
        assert (ROOT / name).exists(), f"{name}: no such file"


def test_the_readme_is_short_and_names_every_page_and_project() -> None:
    readme = _text(ROOT / "README.md")
    assert len(readme.splitlines()) <= 200
    pages = {path.relative_to(ROOT).as_posix() for path in PAGES[1:]}
    assert pages <= set(LINK.findall(readme))
    projects = {path.name for path in (ROOT / "projects" / "aurora").glob("*.yaml")}
    assert projects <= set(re.findall(r"\w+\.yaml", readme))


def test_python_blocks_compile() -> None:
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", _text(page), re.DOTALL):
            compile(block, page.name, "exec")


def _options() -> dict[str, set[str]]:
    """The options of each command of the command line, and of train.py and evaluate.py."""
    [commands] = (action for action in command_parser()._actions if isinstance(action.choices, dict))
    options = {name: {*parser._option_string_actions} for name, parser in commands.choices.items()}
    del options["convert"]  # its arguments go on to a parser of its own
    return options


def test_options_of_commands_are_those_of_their_parsers() -> None:
    known, seen = _options(), 0
    for page in PAGES:
        for program, rest in COMMAND.findall(_text(page).replace("\\\n", " ")):
            name = program.split()[-1].removesuffix(".py")
            given = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest))
            seen += len(given)
            if program.startswith("lavis-aurora") and name != "convert":
                assert name in known, f"{page.name}: {program}"
            unknown = given - known.get(name, given)
            assert not unknown, f"{page.name}: {program} has no {unknown}"
    assert seen > 50
