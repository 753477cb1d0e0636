"""The one place that says where data and weights lie.

- ``AURORA_DATA``: folder of annotations, pictures and videos (LAVIS's relative ``storage`` paths start there)
  and, under ``weights``, of downloaded checkpoints. Without it, data are looked for in ``./data`` and
  checkpoints go to torch's own cache.
- ``${aurora.package:NAME}`` in a YAML is the path of a file that comes with this package, and of no other. A run's
  ``config.yaml`` names such files so, since a clone or an environment may move.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from lavis_aurora.common.errors import AuroraError

PACKAGE_ROOT = Path(__file__).resolve().parents[1]
# An absolute path of a file that comes with the package, wherever the package is.
_PACKAGED = re.compile(rf"/(?:.*/)?{PACKAGE_ROOT.name}/(configs/.+)", re.DOTALL)


def package_file(name: str) -> str:
    """Absolute path of a file in the installed package, e.g. ``configs/models/tiny/vocab.txt``.

    Raises:
        AuroraError: the name leads out of the package.
    """
    # Not resolved: ``projects`` is a link where the package is installed editable.
    path = os.path.normpath(PACKAGE_ROOT / name)
    if not Path(path).is_relative_to(PACKAGE_ROOT):
        raise AuroraError(f"aurora.package:{name} is not in the package; name a file of it, or a path of your own")
    return path


def packaged_name(path: str) -> str | None:
    """NAME of a file that comes with this package, from its absolute path in any place of the package; else None."""
    found = _PACKAGED.fullmatch(os.path.normpath(path))
    return found[1] if found and os.path.exists(PACKAGE_ROOT / found[1]) else None


def package_reference(path: str) -> str:
    """``${aurora.package:NAME}`` for the path of a file in this package; other text so that a YAML reads it back."""
    name = packaged_name(path)
    if name is not None and os.path.normpath(path) == package_file(name):
        return f"${{aurora.package:{name}}}"
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", path)


def relocated(path: str) -> str:
    """The path; where nothing is there any more, that of the same file in this package, if it has one."""
    name = None if os.path.exists(path) else packaged_name(path)
    return path if name is None else package_file(name)


def data_root() -> Path:
    """The absolute folder in which relative data paths start."""
    return Path(os.environ.get("AURORA_DATA") or "data").expanduser().absolute()


def use_weights_folder() -> None:
    """Where AURORA_DATA is set, let torch's hub keep downloaded checkpoints under it."""
    if os.environ.get("AURORA_DATA"):
        torch.hub.set_dir(str(data_root() / "weights"))
