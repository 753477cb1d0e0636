from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_aurora import AuroraError
from lavis_aurora.common.paths import package_file


def test_files_of_the_package_are_found_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Path(package_file("configs/models/tiny/vocab.txt")).is_file()


@pytest.mark.parametrize("name", ["../..", "configs/../../x", "/etc/passwd", ".."])
def test_no_name_leads_out_of_the_package(name):
    with pytest.raises(AuroraError, match=f"aurora.package:{name} is not in the package"):
        package_file(name)
    with pytest.raises(OmegaConfBaseException, match="is not in the package"):
        OmegaConf.create({"a": f"${{aurora.package:{name}}}"}).a  # noqa: B018
