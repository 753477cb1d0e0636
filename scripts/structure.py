"""Measure how the package is built, from its imports:  python scripts/structure.py [--chain]

A room is a folder of modules, or a module that stands alone in lavis_aurora/. It stands one floor above the highest
room that it imports; programs and entry files stand on top. Imports are read by ``ast`` wherever in a module they
stand. The exit status is 1 where a figure is beyond its limit or where imports run in a circle.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lavis_aurora"
LIMITS = {"modules": 90, "floors": 8, "longest chain": 12, "longest module": 350, "longest function": 60}
Graph = Mapping[str, "set[str]"]


@dataclass
class Structure:
    """Figures by name, the longest chain of imports, rooms by floor (from 1), and circles."""

    figures: dict[str, int]
    chain: list[str]
    floors: dict[str, int]
    circles: list[list[str]]


def measure(root: Path = ROOT) -> Structure:
    """Read the package below ``root``, the programs in scripts/ and the entry files."""
    package = {_name(path, root): path for path in (root / PACKAGE).rglob("*.py")}
    programs = {_name(path, root): path for path in (*root.glob("scripts/*.py"), *root.glob("*.py"))}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in {**package, **programs}.items()}
    imports = {name: _imports(name, tree, package) for name, tree in trees.items()}
    rooms: dict[str, set[str]] = {}
    for name, targets in imports.items():
        room = _room(name, package)
        rooms.setdefault(room, set()).update(_room(target, package) for target in targets)
        rooms[room].discard(room)
    within = {name: imports[name] for name in package}
    chains, circles = _longest(within)
    floors, around = _longest(rooms)
    chain = max(chains.values(), key=len)
    functions = [node for name in package for node in ast.walk(trees[name]) if isinstance(node, ast.FunctionDef)]
    figures = {
        "modules": len(package),
        "rooms": len(rooms),
        "floors": max(map(len, floors.values())),
        "longest chain": len(chain),
        "longest module": max(len(path.read_text(encoding="utf-8").splitlines()) for path in package.values()),
        "longest function": max(node.end_lineno - node.lineno + 1 for node in functions),
    }
    return Structure(figures, chain, {room: len(path) for room, path in floors.items()}, circles + around)


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(name: str, package: Mapping[str, Path]) -> str:
    """``lavis_aurora.data.fetch`` stands in ``lavis_aurora/data``."""
    if name not in package:
        return "scripts" if name.startswith("scripts.") else f"{name}.py"
    path = package[name]
    folder = path.parent.relative_to(ROOT) if path.is_relative_to(ROOT) else path.parent
    alone = folder.name == PACKAGE
    return f"{folder}/{path.name}" if alone else str(folder)


def _imports(name: str, tree: ast.Module, package: Mapping[str, Path]) -> set[str]:
    """Modules of the package that a module imports."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one in package else node.module for one in inner}
    return {one for one in found if one in package and one != name}


def _longest(graph: Graph) -> tuple[dict[str, list[str]], list[list[str]]]:
    """The longest path down from each node, and the circles that were met."""
    paths: dict[str, list[str]] = {}
    circles: list[list[str]] = []

    def path(node: str, above: tuple[str, ...]) -> list[str]:
        if node in above:
            circles.append([*above[above.index(node) :], node])
            return []
        if node not in paths:
            below = [path(other, (*above, node)) for other in sorted(graph[node])]
            paths[node] = [node, *max(below, key=len, default=[])]
        return paths[node]

    for node in sorted(graph):
        path(node, ())
    return paths, circles


def main() -> int:
    """Print the figures beside their limits."""
    found = measure()
    for name, value in found.figures.items():
        limit = LIMITS.get(name)
        print(f"{name:<18}{value:>5}" + (f"   at most {limit}" if limit else ""))
    for floor in range(max(found.floors.values()), 0, -1):
        print(f"floor {floor}: {', '.join(sorted(room for room, at in found.floors.items() if at == floor))}")
    for circle in found.circles:
        print("imports in a circle:", " -> ".join(circle))
    if "--chain" in sys.argv:
        print("longest chain:", *found.chain, sep="\n  ")
    return int(bool(found.circles) or any(found.figures[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
