"""Stand-ins for what LAVIS 1.0.2 and transformers 4.26 miss among later packages: import this before LAVIS.

``import lavis_aurora``, the commands, and data processes that these start do so themselves. Where nothing is missing,
nothing is done. This is a module apart from the package because a program may want LAVIS alone.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from contextlib import suppress
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Optional

# Their requirements leave out Python 3.12 and later, so there pip installs them without.
INSTALL_LAVIS = "pip install --no-deps salesforce-lavis==1.0.2 transformers==4.26.1"
BEFORE_US = (
    "LAVIS was imported before lavis_aurora, and needs it here: start anew, and import lavis_aurora (or "
    "lavis_aurora_compat) above lavis and transformers"
)


def release(package: str) -> tuple[int, ...]:
    """(4, 26, 1) of an installed package whose version is 4.26.1; () of one that is not installed."""
    try:
        found = re.match(r"\d+(\.\d+)*", version(package) or "")
    except PackageNotFoundError:
        return ()
    return tuple(map(int, found[0].split("."))) if found else ()


def accept_later_tokenizers() -> None:
    """Let transformers 4.26 be imported with tokenizers 0.14 or later, which it runs with, but refuses.

    Its table of versions is loaded first, with a wider entry; transformers finds that, and checks the others as ever.
    """
    table = "transformers.dependency_versions_table"
    if not (4, 25) <= release("transformers") < (4, 27) or release("tokenizers") < (0, 14) or table in sys.modules:
        return
    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None:
        return
    path = Path(package.origin).with_name("dependency_versions_table.py")
    spec = importlib.util.spec_from_file_location(table, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.deps["tokenizers"] = "tokenizers>=0.11.1"
    sys.modules[table] = module


def stand_in_for_spacy() -> None:
    """LAVIS imports spacy at the head of img2prompt_vqa, for a method of that model alone."""
    if importlib.util.find_spec("spacy") is not None:
        return
    spacy = ModuleType("spacy", "Not installed; this stands in for it, see lavis_aurora_compat.")
    spacy.__spec__ = ModuleSpec("spacy", None)

    def missing(name: str) -> object:
        raise AttributeError(f"spacy.{name}: spacy is not installed; pip install spacy")

    spacy.__dict__["__getattr__"] = missing
    sys.modules["spacy"] = spacy


def restore_numpy_names() -> None:
    """Of the names that numpy 2 has dropped LAVIS uses one."""
    if release("numpy") >= (2,):
        # One that cannot be imported is `lavis-aurora doctor`'s to say.
        with suppress(ImportError):
            import numpy

            vars(numpy).setdefault("Inf", numpy.inf)


def missing_lavis() -> Optional[str]:
    """What to type where LAVIS or its transformers is not installed, in one line; None where both are."""
    absent = [name for name in ("lavis", "transformers") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed; type: {INSTALL_LAVIS}" if absent else None


def why_lavis_fails(error: Exception) -> str:
    """What to do where LAVIS is installed and cannot be imported."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if release("transformers") >= (4, 27):
        return (
            f"LAVIS runs with transformers 4.26, and {version('transformers')} is installed ({reason}); adapters for "
            f"other models work in an environment without LAVIS, see docs/any_model.md"
        )
    if _TOO_LATE and release("tokenizers") >= (0, 14):
        return BEFORE_US
    return missing_lavis() or f"LAVIS cannot be imported ({reason}); `lavis-aurora doctor` looks for the cause"


_TOO_LATE = any(name.partition(".")[0] in ("lavis", "transformers") for name in sys.modules)
accept_later_tokenizers()
stand_in_for_spacy()
restore_numpy_names()
