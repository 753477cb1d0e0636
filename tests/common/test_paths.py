from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_aurora import AuroraError
from lavis_aurora.common.paths import PACKAGE_ROOT, package_file, package_reference, relocated


def test_files_of_the_package_are_found_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Path(package_file("configs/models/tiny/vocab.txt")).is_file()


@pytest.mark.parametrize("name", ["../..", "configs/../../x", "/etc/passwd", ".."])
def test_no_name_leads_out_of_the_package(name):
    with pytest.raises(AuroraError, match=f"aurora.package:{name} is not in the package"):
        package_file(name)
    with pytest.raises(OmegaConfBaseException, match="is not in the package"):
        OmegaConf.create({"a": f"${{aurora.package:{name}}}"}).a  # noqa: B018


WEIGHTS = "configs/models/tiny/model.safetensors"


def test_a_file_of_the_package_is_named_by_its_place_there_and_other_text_is_read_back_as_it_is(tmp_path):
    assert package_reference(package_file(WEIGHTS)) == f"${{aurora.package:{WEIGHTS}}}"
    other = f"/elsewhere/{PACKAGE_ROOT.name}/{WEIGHTS}"  # somebody's own file
    odd = ["x${y", "${y}", r"\${y}", r"a\\${b}", f"{PACKAGE_ROOT}/configs/none.yaml", str(PACKAGE_ROOT), other, ""]
    for text in (package_file(WEIGHTS), package_file("configs/models/tiny"), *odd):
        assert OmegaConf.create({"a": package_reference(text)}).a == text


def test_a_path_from_a_package_that_was_elsewhere_is_found_here(tmp_path):
    moved = tmp_path / "old" / PACKAGE_ROOT.name / WEIGHTS
    assert relocated(str(moved)) == package_file(WEIGHTS)
    assert relocated(str(moved.parent)) == package_file("configs/models/tiny")
    outside, long = f"{moved.parent}/../../../../x", f"{moved.parent}/{'x' * 5000}"
    address = f"https://x.org/{PACKAGE_ROOT.name}/{WEIGHTS}"
    for path in (moved.with_name("none"), f"{tmp_path}/{WEIGHTS}", outside, long, address, "", "a red star"):
        assert relocated(str(path)) == str(path)
    moved.parent.mkdir(parents=True)
    moved.write_bytes(b"own")
    assert relocated(str(moved)) == str(moved), "what is there is meant"
