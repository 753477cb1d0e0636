"""Measure how the package is built, from its imports:  python scripts/structure.py [--chain]

A room is a folder of modules, or a module that stands alone in lavis_aurora/. It stands one floor above the highest
room that it imports; programs and entry files stand on top. Imports are read by ``ast`` wherever in a module they
stand, except those for types alone. Of an ``__init__`` that only hands names on, the modules that have the names are
imported. The exit status is 1 where a figure is beyond its limit or where imports run in a circle.
"""

from __future__ import annotations

import ast
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lavis_aurora"
LIMITS = {"modules": 128, "floors": 9, "longest chain": 12, "longest module": 350, "longest function": 60}
Graph = Mapping[str, "set[str]"]


class Module(NamedTuple):
    """A file: its name as an import has it (programs: ``scripts.NAME``), its room, lines and content."""

    name: str
    room: str
    lines: int
    tree: ast.Module
    nodes: list[ast.AST]  # all of the tree's
    package: bool  # of an __init__, its folder's name is that of the module


@dataclass
class Structure:
    """What was measured.

    Attributes:
        figures: by name; those of :data:`LIMITS` and others.
        longest: which module and which function are the longest.
        chain: the longest chain of imports in the package, from its top.
        floors: of each room, from 1.
        circles: of modules or rooms that import each other.
    """

    figures: dict[str, int]
    longest: dict[str, str]
    chain: list[str]
    floors: dict[str, int]
    circles: list[list[str]]


def measure(root: Path = ROOT) -> Structure:
    """Read the package below ``root``, the programs in scripts/ and the entry files."""
    paths = [*(root / PACKAGE).rglob("*.py"), *root.glob("scripts/*.py"), *root.glob("*.py")]
    modules = {module.name: module for module in (_read(path, root) for path in sorted(paths))}
    package = {name for name in modules if name.split(".")[0] == PACKAGE}
    imports = {name: _imports(module, modules, typing=False) for name, module in modules.items()}
    for_types = {name: _imports(module, modules, typing=True) for name, module in modules.items()}
    rooms: dict[str, set[str]] = {}
    for name, targets in imports.items():
        room = modules[name].room
        rooms.setdefault(room, set()).update(modules[target].room for target in targets)
        rooms[room].discard(room)
    chains, circles = _longest({name: imports[name] & package for name in package})
    floors, around = _longest(rooms)
    chain = max(chains.values(), key=len)
    functions = dict(entry for module in modules.values() for entry in _functions(module))
    longest = {
        "longest module": max(modules, key=lambda name: modules[name].lines),
        "longest function": max(functions, key=lambda name: functions[name]),
    }
    figures = {
        "modules": len(package),
        "rooms": len(rooms),
        "floors": max(map(len, floors.values())),
        "longest chain": len(chain),
        "longest module": modules[longest["longest module"]].lines,
        "longest function": functions[longest["longest function"]],
        "imports for types": sum(map(len, for_types.values())),
    }
    return Structure(figures, longest, chain, {room: len(path) for room, path in floors.items()}, circles + around)


def _read(path: Path, root: Path) -> Module:
    """``lavis_aurora/data/fetch.py`` is in the room ``lavis_aurora/data``."""
    inner, text = path.relative_to(root), path.read_text(encoding="utf-8")
    parts = inner.with_suffix("").parts
    package = parts[-1] == "__init__"
    alone = inner.parent.as_posix() in (".", PACKAGE)
    room = inner if alone else inner.parent
    name = ".".join(parts[:-1] if package else parts)
    tree = ast.parse(text)
    return Module(name, room.as_posix(), len(text.splitlines()), tree, [*ast.walk(tree)], package)


def _functions(module: Module) -> Iterator[tuple[str, int]]:
    """(name, lines) of each function and method."""
    for node in module.nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{module.name}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def _imports(module: Module, modules: Mapping[str, Module], typing: bool) -> set[str]:
    """Modules of ``modules`` that one imports, when it runs or for types alone."""
    for_types = {
        id(node)
        for block in module.nodes
        if isinstance(block, ast.If) and _name(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    found: set[str] = set()
    for node in module.nodes:
        if (id(node) in for_types) != typing:
            continue
        if isinstance(node, ast.Import):
            found |= {_known(alias.name, module, modules) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = _known(_source(node, module), module, modules)
            found |= {_home(source, alias.name, modules) for alias in node.names}
    return {name for name in found if name in modules and name != module.name}


def _name(test: ast.expr) -> str:
    """Of what an ``if`` asks, where that is a name."""
    return ast.unparse(test) if isinstance(test, (ast.Name, ast.Attribute)) else ""


def _source(node: ast.ImportFrom, module: Module) -> str:
    """The name of what ``from ... import`` reads, also where it is relative."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    above = parts[: len(parts) - node.level + module.package]
    return ".".join([*above, *([node.module] if node.module else [])])


def _known(name: str, module: Module, modules: Mapping[str, Module]) -> str:
    """Programs import each other by their plain names."""
    beside = f"scripts.{name}"
    return beside if module.room == "scripts" and beside in modules else name


def _home(source: str, name: str, modules: Mapping[str, Module]) -> str:
    """The module that a name comes from: of a package, a module in it, or what its ``__init__`` hands on."""
    if f"{source}.{name}" in modules:
        return f"{source}.{name}"
    module = modules.get(source)
    if module is None or not module.package or not _only_hands_on(module.tree):
        return source
    for node in module.tree.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if name in (alias.asname or alias.name, "*"):
                    return _home(_source(node, module), alias.name, modules)
    return source


def _only_hands_on(tree: ast.Module) -> bool:
    """Whether there is nothing but a docstring, imports and ``__all__``."""
    return all(
        isinstance(node, (ast.Import, ast.ImportFrom))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"])
        for node in tree.body
    )


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


def beyond(found: Structure) -> list[str]:
    """What is not as it should be, a line each; empty if all is well."""
    over = [f"{name}: {found.figures[name]}, at most {limit}" for name, limit in LIMITS.items()]
    over = [line for line, (name, limit) in zip(over, LIMITS.items()) if found.figures[name] > limit]
    return over + ["imports in a circle: " + " -> ".join(circle) for circle in found.circles]


def main() -> int:
    """Print the figures with their limits."""
    found = measure()
    for name, value in found.figures.items():
        limit = f"   at most {LIMITS[name]}" if name in LIMITS else ""
        print(f"{name:<18}{value:>5}{limit:<15}{found.longest.get(name, '')}".rstrip())
    for floor in range(max(found.floors.values()), 0, -1):
        print(f"floor {floor}: {', '.join(sorted(room for room, at in found.floors.items() if at == floor))}")
    if "--chain" in sys.argv:
        print("longest chain:", *found.chain, sep="\n  ")
    wrong = beyond(found)
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may leave early
    sys.exit(main())
