"""The command ``lavis-aurora``, ``train.py``, ``evaluate.py``: arguments, and what needs neither a model nor LAVIS.

This stands beside the package because importing that registers everything with LAVIS, which takes seconds: what a
command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import lavis_aurora_compat as compat  # before LAVIS, and in data processes that start by importing the program

from lavis_aurora_commands import (
    add_adapter_commands,
    add_options,
    add_rank_commands,
    add_search_commands,
    show,
    show_ranks,
)

PROJECTS = Path(__file__).with_name("lavis_aurora") / "projects"
TRAIN = "train a model as a project YAML says, then test its best epoch"
EVALUATE = "evaluate a model on the test splits of a project YAML"


def main(argv: Sequence[str] | None = None) -> None:
    """``lavis-aurora COMMAND ...``, see :func:`command_parser`."""
    args = command_parser().parse_args(argv)
    if args.command == "configs" and not args.names:
        print(configs())
        return
    if args.command == "doctor":
        from lavis_aurora_doctor import doctor

        sys.exit(doctor(args.json))
    _act(args)


def train(argv: Sequence[str] | None = None) -> None:
    """``python train.py --cfg-path YAML [--options KEY=VALUE ...]``."""
    _act(_run_parser(TRAIN, evaluate=False).parse_args(argv))


def evaluate(argv: Sequence[str] | None = None) -> None:
    """``python evaluate.py --cfg-path YAML [--options KEY=VALUE ...]``."""
    _act(_run_parser(EVALUATE, evaluate=True).parse_args(argv))


def end_with_parent() -> None:
    """Let Linux kill this process once the thread that started it has ended, however; other systems cannot."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _act(args: argparse.Namespace) -> None:
    if missing := compat.missing_lavis():
        sys.exit(f"error: {missing}")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Of a killed agent the processes would go on with those of other agents.
        end_with_parent()
    from lavis_aurora.cli import exit_on_error

    exit_on_error(lambda: args.action(args))


def _run_parser(description: str, evaluate: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    _add_run_arguments(parser, evaluate)
    return parser


def command_parser() -> argparse.ArgumentParser:
    """All commands; each leaves its function in ``action``."""
    parser = argparse.ArgumentParser(prog="lavis-aurora", description="Aurora for LAVIS.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run_arguments(commands.add_parser("train", help=TRAIN), evaluate=False)
    _add_run_arguments(commands.add_parser("evaluate", help=EVALUATE), evaluate=True)

    add_search_commands(commands)

    one = commands.add_parser("check", help="report what is in the data of a project YAML, without training")
    one.add_argument("path", metavar="YAML", help="project YAML; run.evaluate=true for what an evaluation reads")
    one.add_argument("--decode", action="store_true", help="read each picture and video, too")
    add_options(one)
    one.set_defaults(action=_check)

    one = commands.add_parser("inspect", help="what is in an adapter, a file of weights, or a folder of runs")
    one.add_argument("path", metavar="FOLDER_OR_FILE")
    one.set_defaults(action=_inspect)

    add_adapter_commands(commands)

    add_rank_commands(commands)

    one = commands.add_parser("targets", help="which weights of a model would be adapted")
    one.add_argument(
        "model",
        metavar="MODEL",
        help="name, e.g. blip_retrieval_aurora (built without its weights); or a project YAML",
    )
    one.add_argument("--model-type", help="one of its types")
    one.set_defaults(action=_targets)

    one = commands.add_parser("configs", help="list the project YAMLs that come with the package, or copy some")
    one.add_argument("names", nargs="*", metavar="NAME", help="copy these")
    one.add_argument("--to", default=".", metavar="FOLDER", help="where to; the current directory by default")
    one.set_defaults(action=lambda args: print(configs(args.names, args.to)))

    one = commands.add_parser("compare", help="results of runs beside those of the paper, and what differs")
    one.add_argument("results", nargs="+", metavar="RESULT", help="folder of a run, or a file of its folder result")
    one.add_argument("--benchmark", help="compare with this one, whatever the run's data are, e.g. flickr30k")
    one.add_argument("--table", help="table of the paper: 1, 2, 3 or 4 (zero-shot); found by itself")
    one.set_defaults(action=_compare)

    # Its arguments, options too, go on to a parser of its own.
    what = "published annotations into the files that LAVIS reads"
    one = commands.add_parser("convert", help=what, add_help=False, prefix_chars="\0")
    one.add_argument("arguments", nargs="*")
    one.set_defaults(action=_convert)

    one = commands.add_parser("doctor", help="what is installed, whether it works together, what to do if not")
    one.add_argument("--json", action="store_true", help="the same for programs")
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser, evaluate: bool) -> None:
    """The arguments of train and evaluate, and what is done with them."""
    parser.add_argument("--cfg-path", required=True, help="project YAML, e.g. projects/aurora/flickr_ret.yaml")
    add_options(parser)
    parser.set_defaults(action=_run, evaluate=evaluate)


def _run(args: argparse.Namespace) -> None:
    from lavis_aurora.project import load_config
    from lavis_aurora.training.start import run_config

    cfg = load_config(args.cfg_path, args.options, args.evaluate)
    folder = run_config(cfg)
    if cfg.run_cfg.rank is not None and not cfg.run_cfg.evaluate:
        show_ranks(folder)


def _check(args: argparse.Namespace) -> None:
    from lavis_aurora.project import load_config
    from lavis_aurora.training.data import check_data

    check_data(load_config(args.path, args.options), args.decode)


def _inspect(args: argparse.Namespace) -> None:
    from lavis_aurora.cli import inspect

    show(inspect(args.path))


def _targets(args: argparse.Namespace) -> None:
    from lavis_aurora.cli import targets

    show(targets(args.model, args.model_type))


def _compare(args: argparse.Namespace) -> None:
    from lavis_aurora.analysis.compare import compare

    show(compare(args.results, args.benchmark, args.table))


def _convert(args: argparse.Namespace) -> None:
    from lavis_aurora.data.convert import main

    main(args.arguments)


def configs(names: Sequence[str] = (), folder: str = ".") -> str:
    """List the project YAMLs, or copy those named to a folder; what was done, as text.

    Raises:
        AuroraError: no such project, or a file is there already; none is copied then. Or one cannot be written.
    """
    paths = [*sorted(PROJECTS.glob("*.yaml")), *sorted(PROJECTS.glob("*/*.yaml"))]
    known = {path.relative_to(PROJECTS).with_suffix("").as_posix(): path for path in paths}
    if not names:
        width = max(map(len, known))
        lines = ((name, textwrap.wrap(_summary(path), 100)) for name, path in known.items())
        return "\n".join(f"{name:<{width}}  " + f"\n{'':<{width}}  ".join(words) for name, words in lines)
    from lavis_aurora.common.errors import AuroraError, did_you_mean
    from lavis_aurora.common.files import writing

    targets = {}
    for name in names:
        stem = name.removesuffix(".yaml")
        if stem not in known:
            raise AuroraError(f"no project {name!r}{did_you_mean(stem, known)}")
        targets[stem] = Path(folder) / f"{stem}.yaml"
    for target in targets.values():
        if target.exists():
            raise AuroraError(f"{target} is there already; remove it, or name another folder by --to")
    for stem, target in targets.items():
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(known[stem], target)
    return "\n".join(map(str, targets.values()))


def _summary(path: Path) -> str:
    """The first line of the comment at the top of a YAML, which says what it is, to the end of its sentence."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines)]
    text = " ".join(comment)
    end = re.compile(r"\.( |$)").search(text, len(comment[0]) - 1)
    return text[: end.start() + 1] if end else text


if __name__ == "__main__":
    main()
