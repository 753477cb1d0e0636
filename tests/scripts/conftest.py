"""Programs in scripts/ import each other by their plain names."""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_figures import retrieval_runs  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
