"""The one place that says where data and weights lie.

- ``AURORA_DATA``: folder of annotations, pictures and videos (LAVIS's relative ``storage`` paths start there)
  and, under ``weights``, of downloaded checkpoints. Without it, data are looked for in ``./data`` and
  checkpoints go to torch's own cache.
- ``${aurora.package:NAME}`` in a YAML is the path of a file that comes with this package, and of no other.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lavis_aurora.common.errors import AuroraError

PACKAGE_ROOT = Path(__file__).resolve().parents[1]


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


def data_root() -> Path:
    """The absolute folder in which relative data paths start."""
    return Path(os.environ.get("AURORA_DATA") or "data").expanduser().absolute()


def use_weights_folder() -> None:
    """Where AURORA_DATA is set, let torch's hub keep downloaded checkpoints under it."""
    if os.environ.get("AURORA_DATA"):
        torch.hub.set_dir(str(data_root() / "weights"))
