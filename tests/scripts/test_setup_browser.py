"""scripts/setup_browser.sh, with stand-ins for the programs that it calls."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/setup_browser.sh"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the script where there are only these programs, each by the shell command that it does."""

    def done(user: int, **programs: str) -> subprocess.CompletedProcess[str]:
        bash = str(shutil.which("bash"))
        for tool in ("mktemp", "tail", "rm", "cat"):
            (tmp_path / tool).symlink_to(str(shutil.which(tool)))
        for name, does in {"id": f"echo {user}", **programs}.items():
            program = tmp_path / name.replace("_", "-")
            program.write_text(f"#!{bash}\n{does}\n", encoding="utf-8")
            program.chmod(0o755)
        return subprocess.run([bash, str(SCRIPT)], env={"PATH": str(tmp_path)}, capture_output=True, text=True)

    return done


def test_a_browser_that_is_there_is_enough(run: Run) -> None:
    done = run(0, chromium="exit 1", apt_get="echo called >&2; exit 1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_it_is_installed_by_root(run: Run, tmp_path: Path) -> None:
    done = run(0, apt_get=f'echo "$@" >> {tmp_path}/calls')
    assert (done.returncode, done.stderr) == (0, "")
    calls = (tmp_path / "calls").read_text(encoding="utf-8")
    assert calls == "update\ninstall -y --no-install-recommends chromium\n"


@pytest.mark.parametrize(
    ("user", "programs", "why"),
    [
        (1000, {"apt_get": "exit 0"}, "install chromium"),
        (0, {}, "install chromium"),
        (0, {"apt_get": "exit 1"}, "above"),
    ],
)
def test_without_one_it_is_said_and_no_failure(run: Run, user: int, programs: dict[str, str], why: str) -> None:
    done = run(user, **programs)
    assert done.returncode == 0
    assert "the page is not tested in a browser" in done.stderr and why in done.stderr
