"""A project to load."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import project_yaml


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return project_yaml(tmp_path, count=1)
