"""What ``mkdocs.yml`` does not say of the site: its navigation, its front page and the reference of the package.

Nothing is written twice. README.md is the front page, and its table of pages the navigation. Links are those that
work on GitHub: one to a page of the repository leads to its page of the site, one to another file to a copy of it.
The reference has a page for each folder of the package, from sources that are read and not imported.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lavis_aurora"
# Pages that stand in the root of the repository, and their place in the site.
OUTER = {"README.md": "index.md"} | {name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")}
ROW = re.compile(r"^\| \[([^\]]+)\]\((docs/[\w.-]+\.md)\) \|", re.MULTILINE)
LINK_OR_CODE = re.compile(r"```.*?```|^    [^\n]*|`[^`\n]*`|\]\(([^)\s]+)\)", re.DOTALL | re.MULTILINE)
# What a browser fetches to show a page.
FETCHED = re.compile(r"""(?:\bsrc=|<link\b[^>]*\bhref=)["']?((?:https?:)?//[^"'\s>]+)""")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc|obj):`~?([\w.]+)`")


def _text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def navigation(readme: str) -> list[dict[str, Any]]:
    """The pages in the order and by the names of README.md's table."""
    pages = [{title: path.removeprefix("docs/")} for title, path in ROW.findall(readme)]
    reference = ["api/index.md", *(f"api/{folder}.md" for folder in _folders())]
    last = {"Contributing": "CONTRIBUTING.md", "Changelog": "CHANGELOG.md", "Security": "SECURITY.md"}
    return [{"Home": "index.md"}, *pages, {"API reference": reference}, *({k: v} for k, v in last.items())]


def site_link(link: str, page: str) -> tuple[str, str | None]:
    """A link of a page, both as in the repository: the link in the site, and the file to copy there, if any."""
    address, anchor, fragment = link.partition("#")
    if re.match(r"\w+:", link) or not address:
        return link, None
    target, copied = posixpath.normpath(posixpath.join(posixpath.dirname(page), address)), None
    place = OUTER.get(target)
    if place is None and target.startswith("docs/"):
        place = target.removeprefix("docs/")
    elif place is None and (ROOT / target).is_file():
        place, copied = f"files/{target}", target
    if place is None:
        return link, None  # mkdocs says that it is not found
    start = posixpath.dirname(_place(page))
    return posixpath.relpath(place, start or ".") + anchor + fragment, copied


def _place(page: str) -> str:
    return OUTER.get(page) or page.removeprefix("docs/")


def _folders() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py"))


def _reference(folder: str) -> str:
    """The page of a folder of the package: all its modules."""
    path = ROOT / PACKAGE / folder
    names = [p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in sorted(path.rglob("*.py"))]
    names = [name.removesuffix(".__init__") for name in names]
    return "\n\n".join([f"# {folder}", *(f"::: {name}" for name in names)]) + "\n"


def _package() -> griffe.Module:
    source = {"search_paths": [ROOT], "try_relative_path": False}
    found = griffe.load(PACKAGE, allow_inspection=False, resolve_aliases=True, **source)
    assert isinstance(found, griffe.Module)
    return found


def _contents() -> str:
    """The front page of the reference: what the package itself offers."""
    package = _package()
    lines = ["# API reference", "", _summary(package), "", f"`from {PACKAGE} import`", ""]
    lines += ["| | |", "| --- | --- |"]
    for name in sorted(str(export) for export in package.exports or []):
        member = package[name]
        lines.append(f"| [`{name}`][{member.canonical_path}] | {_summary(member)} |")
    lines += ["", "By folder", "", "| | |", "| --- | --- |"]
    lines += [f"| [{folder}]({folder}.md) | {_summary(package[folder])} |" for folder in _folders()]
    return "\n".join(lines) + "\n"


def _summary(member: griffe.Object | griffe.Alias) -> str:
    text = member.docstring.value if member.docstring else ""
    return " ".join(plain_roles(text, {}).partition("\n\n")[0].split()).replace("|", r"\|")


def plain_roles(text: str, paths: dict[str, str]) -> str:
    """Sphinx's roles, which docstrings hold, as links to what they name, or as code where the reference lacks it."""

    def replaced(role: re.Match[str]) -> str:
        name = role[1].rpartition(".")[2]
        path = paths.get(role[1])
        return f"[`{name}`][{path}]" if path else f"`{name}`"

    return ROLE.sub(replaced, text)


class Roles(griffe.Extension):
    """Cross-references of the docstrings, by :func:`plain_roles`."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        documented = [member for member in _members(pkg) if member.docstring]
        paths: dict[str, str] = {}
        for member in documented:
            if not member.is_private:
                paths[member.path] = member.path
                paths.setdefault(member.name, member.path)
        for member in documented:
            member.docstring.value = plain_roles(member.docstring.value, paths)


def _members(parent: griffe.Object) -> Any:
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from _members(member)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = navigation(_text("README.md"))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, place in OUTER.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, "api/index.md", content=_contents()))
    for folder in _folders():
        files.append(File.generated(config, f"api/{folder}.md", content=_reference(folder)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    place = page.file.src_uri
    if place.startswith("api/"):
        return markdown
    source = next((name for name, inside in OUTER.items() if inside == place), f"docs/{place}")

    def replaced(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0]
        link, copied = site_link(found[1], source)
        if copied and not files.get_file_from_path(f"files/{copied}"):
            files.append(File.generated(config, f"files/{copied}", abs_src_path=str(ROOT / copied)))
        return f"]({link})"

    return LINK_OR_CODE.sub(replaced, markdown)


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    for address in FETCHED.findall(output):
        logging.getLogger("mkdocs").warning("%s would be fetched from the network: %s", page.file.src_uri, address)
    return output
