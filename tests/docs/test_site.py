"""The site of the documentation: its navigation, its links, and that a fault in them stops the build."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import lavis_aurora

mkdocs_config = pytest.importorskip("mkdocs.config", reason="the extra [docs] is not installed")
build = importlib.import_module("mkdocs.commands.build").build
Abort = importlib.import_module("mkdocs.exceptions").Abort

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The repository's pages, without the reference of the package, which has its build of its own (.ci/run)."""
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "docs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "lavis_aurora/adapters").mkdir(parents=True)
    (tmp_path / "lavis_aurora/__init__.py").write_text('"""The package."""\n\n__all__: list[str] = []\n')
    (tmp_path / "lavis_aurora/adapters/__init__.py").write_text('"""A room, see :func:`shown`."""\n')
    settings = re.sub(r"(?ms)  - mkdocstrings:.*?(?=^hooks)", "", (ROOT / "mkdocs.yml").read_text())
    (tmp_path / "mkdocs.yml").write_text(settings)
    return tmp_path


def _build(project: Path) -> dict[str, str]:
    config = mkdocs_config.load_config(str(project / "mkdocs.yml"), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    pages = (project / "site").rglob("*.html")
    return {path.relative_to(project / "site").as_posix(): path.read_text(encoding="utf-8") for path in pages}


def _add(page: Path, text: str) -> None:
    page.write_text(page.read_text(encoding="utf-8") + text, encoding="utf-8")


def test_every_page_is_there_and_leads_to_the_others(project: Path) -> None:
    links = "[licence](../LICENSE) and [home](../README.md#install), `[code](not/a/link)`"
    _add(project / "docs/adapters.md", f"\n{links}\n")
    pages = _build(project)
    expected = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    assert expected | {"index.html", "CONTRIBUTING.html", "api/index.html", "api/adapters.html"} <= set(pages)
    assert "docs/" not in " ".join(re.findall(r'href="([^"#:]*)"', pages["index.html"]))
    assert 'href="adapters.html"' in pages["index.html"] and 'src="search_app.png"' in pages["index.html"]
    assert 'href="files/LICENSE"' in pages["adapters.html"] and 'href="index.html#install"' in pages["adapters.html"]
    assert (project / "site/files/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "[code](not/a/link)" in pages["adapters.html"]
    assert "A room, see <code>shown</code>." in pages["api/index.html"]


@pytest.mark.slow
def test_faults_of_pages_stop_the_build(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each of them is named."""
    faults = ("nowhere.md", "../lavis_aurora/nowhere.py", "install.md#no-such-heading", "https://example.org/x.png")
    _add(project / "docs/adapters.md", "\n" + "\n".join(f"![x]({fault})" for fault in faults) + "\n")
    (project / "docs/new.md").write_text("# New\n")
    with pytest.raises(Abort):
        _build(project)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for fault in (*faults, "new.md"):
        assert any(fault in warning for warning in warnings), fault
    assert len(warnings) == len(faults) + 1


def test_roles_become_references(site_hooks: ModuleType) -> None:
    paths = {"shown": "lavis_aurora.common.errors.shown"}
    assert site_hooks.plain_roles("by :func:`shown`", paths) == "by [`shown`][lavis_aurora.common.errors.shown]"
    assert site_hooks.plain_roles("by :class:`~torch.Tensor`", paths) == "by `Tensor`"


@pytest.fixture(scope="module")
def site_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts/docs_site.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_package_is_read_and_not_imported(site_hooks: ModuleType) -> None:
    """Each name that it offers leads to its documentation."""
    contents = site_hooks._contents()
    for name in lavis_aurora.__all__:
        assert re.search(rf"^\| \[`{name}`\]\[lavis_aurora\.[\w.]+\.{name}\] \| \w", contents, re.MULTILINE), name
    source = (ROOT / "scripts/docs_site.py").read_text(encoding="utf-8")
    assert "allow_inspection=False" in source and "import lavis" not in source
    assert "allow_inspection: false" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_versions_and_authors_are_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    version, date = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    assert (citation["version"], citation["date-released"]) == (lavis_aurora.__version__, date)
    assert version == lavis_aurora.__version__
    bibtex = re.search(r"author = \{(.*?)\}", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    authors = [f"{one['family-names']}, {one['given-names']}" for one in citation["preferred-citation"]["authors"]]
    assert authors == re.split(r"\s+and\s+", bibtex)
    assert citation["preferred-citation"]["title"] in (ROOT / "README.md").read_text(encoding="utf-8")
