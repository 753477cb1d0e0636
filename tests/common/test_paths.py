from pathlib import Path

import pytest
import torch
from lavis.common.registry import registry
from lavis.common.utils import get_cache_path
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_aurora import AuroraError
from lavis_aurora.common.paths import data_root, package_file, use_data_root


def test_data_lie_under_aurora_data_or_the_current_directory(monkeypatch, tmp_path):
    before, hub = registry.get_path("cache_root"), torch.hub.get_dir()
    try:
        monkeypatch.setenv("AURORA_DATA", str(tmp_path))
        use_data_root()
        assert data_root() == tmp_path
        assert get_cache_path("coco/images") == str(tmp_path / "coco/images")
        assert torch.hub.get_dir() == str(tmp_path / "weights")
        monkeypatch.delenv("AURORA_DATA")
        monkeypatch.chdir(tmp_path)
        use_data_root()
        assert get_cache_path("coco/images") == str(tmp_path / "data/coco/images")
    finally:
        registry.mapping["paths"]["cache_root"] = before
        torch.hub.set_dir(hub)


def test_files_of_the_package_are_found_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Path(package_file("configs/models/tiny/vocab.txt")).is_file()


@pytest.mark.parametrize("name", ["../..", "configs/../../x", "/etc/passwd", ".."])
def test_no_name_leads_out_of_the_package(name):
    with pytest.raises(AuroraError, match=f"aurora.package:{name} is not in the package"):
        package_file(name)
    with pytest.raises(OmegaConfBaseException, match="is not in the package"):
        OmegaConf.create({"a": f"${{aurora.package:{name}}}"}).a  # noqa: B018
