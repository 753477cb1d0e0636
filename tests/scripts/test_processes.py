"""Programs in processes of their own: how many at a time, and how they end."""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

import pytest
from processes import TrainingProcess, add_jobs_argument, run_all

# Stops once it is told to, and writes down how often it was.
WAITS = """
import pathlib, signal, sys, time
told = pathlib.Path(sys.argv[sys.argv.index("--options") + 1])
signal.signal(signal.SIGTERM, lambda *_: (told.open("a").write("x"), sys.exit(3)))
signal.signal(signal.SIGINT, lambda *_: told.open("a").write("interrupted"))
print("ready", flush=True)
time.sleep(60)
"""


class SignalRecorder(TrainingProcess):
    """A process that waits for its end."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.told = folder / f"run_{name}", folder / name
        self.program = folder / "waits.py"
        self.program.write_text(WAITS)

    def start(self) -> None:
        self.launch(self.program, "x.yaml", [str(self.told)])
        while "ready" not in self.output():
            time.sleep(0.02)


def test_so_many_run_at_a_time_and_in_order() -> None:
    started, most = [], []

    class EndsWhenAskedTwice(TrainingProcess):
        asked = 0

        def poll(self) -> bool:
            self.asked += 1
            return self.asked > 1

    def report(active: list, waiting: int) -> None:
        most.append((len(active), waiting))

    runs = [EndsWhenAskedTwice() for _ in range(5)]
    run_all(runs, 2, started.append, EndsWhenAskedTwice.poll, report)
    assert started == runs
    # Two end, then two, then the last; each time what follows has not started yet.
    assert most == [(0, 3), (0, 1), (0, 0)]


def test_ctrl_c_is_passed_on_once(tmp_path: Path) -> None:
    """A second signal would stop a training before it has saved."""
    runs = [SignalRecorder(tmp_path, name) for name in "ab"]

    def interrupted(run: SignalRecorder) -> bool:
        # The terminal sends it to all processes of the session's group.
        assert os.getsid(run.process.pid) != os.getsid(0) and os.getpgid(run.process.pid) != os.getpgid(0)
        if run is runs[1]:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run_all(runs, 2, SignalRecorder.start, interrupted, lambda active, waiting: None)
    assert [run.process.returncode for run in runs] == [3, 3]
    assert [run.told.read_text() for run in runs] == ["x", "x"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_what_runs(tmp_path: Path, number: int) -> None:
    """A closed terminal sends SIGHUP to the program alone."""
    run, before = SignalRecorder(tmp_path, "a"), signal.getsignal(number)

    def told(run: SignalRecorder) -> bool:
        os.kill(os.getpid(), number)
        return False

    with pytest.raises(SystemExit, match=str(128 + number)):
        run_all([run], 1, SignalRecorder.start, told, lambda active, waiting: None)
    assert run.process.returncode == 3 and run.told.read_text() == "x"
    assert signal.getsignal(number) is before


class OfSeveralCommands(TrainingProcess):
    """One that another command runs while it is asked for so many times, and has done or not then."""

    def __init__(self, name: str, busy: int = 0, done: bool = False) -> None:
        self.folder, self.busy, self.done, self.polls, self.held = Path(name), busy, done, 0, 0

    def take(self) -> bool:
        self.busy -= 1
        self.held += self.busy < 0
        return self.busy < 0

    def release(self) -> None:
        self.held -= 1

    def is_done(self) -> bool:
        return self.done

    def poll(self) -> bool:
        self.polls += 1
        return self.polls > 2


def test_what_other_commands_run_is_waited_for_and_counted(capsys) -> None:
    """Done there it is left alone, failed there it is run here; the two that are known to be there are no others."""
    done, failed = OfSeveralCommands("done", 5, done=True), OfSeveralCommands("failed", 4)
    runs, started, seen = [done, failed, OfSeveralCommands("own")], [], []

    def report(active: list, pending: int) -> None:
        seen.append(([run.folder.name for run in active], pending, sum(run.elsewhere for run in runs)))

    run_all(runs, 2, started.append, OfSeveralCommands.poll, report)
    assert [run.folder.name for run in started] == ["own", "failed"]
    assert seen == [([], 2, 2), ([], 0, 0)]
    assert [run.held for run in runs] == [0, 0, 0]
    assert capsys.readouterr().out.splitlines() == [
        "waiting for runs of other commands (2), e.g. done",
        "waiting for runs of other commands (1), e.g. done",
    ]


def test_one_that_another_command_gave_up_waits_for_room() -> None:
    failed, own, started = OfSeveralCommands("failed", 1), OfSeveralCommands("own"), []

    def start(process: OfSeveralCommands) -> None:
        assert all(one.polls > 2 for one in started), "two run, of one at a time"
        started.append(process)

    run_all([failed, own], 1, start, OfSeveralCommands.poll, lambda active, pending: None)
    assert started == [own, failed] and failed.held == 0


@pytest.mark.parametrize("jobs", ["0", "-1", "two"])
def test_none_at_a_time_is_refused(jobs: str, capsys) -> None:
    parser = argparse.ArgumentParser()
    add_jobs_argument(parser, 2)
    assert parser.parse_args([]).jobs == 2 and parser.parse_args(["--jobs", "3"]).jobs == 3
    with pytest.raises(SystemExit):
        parser.parse_args(["--jobs", jobs])
    assert f"argument --jobs: invalid positive value: '{jobs}'" in capsys.readouterr().err
