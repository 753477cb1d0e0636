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

    one = commands.add_parser("check", help="report what is in the data of a project YAML, without training")
    one.add_argument("path", metavar="YAML", help="project YAML; run.evaluate=true for what an evaluation reads")
    one.add_argument("--decode", action="store_true", help="read each picture and video, too")
    _add_options(one)
    one.set_defaults(action=_check)

    one = commands.add_parser("inspect", help="what is in an adapter, a file of weights, or a folder of runs")
    one.add_argument("path", metavar="FOLDER_OR_FILE")
    one.set_defaults(action=_inspect)

    _add_adapter_commands(commands)

    _add_rank_commands(commands)

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


def _add_adapter_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """What is done with adapters that are there."""
    one = commands.add_parser("diff", help="how two adapters differ: settings, norms and cosines of their updates")
    one.add_argument("first", metavar="A", help="an adapter folder")
    one.add_argument("second", metavar="B", help="another")
    one.set_defaults(action=_diff)

    one = commands.add_parser("merge-adapters", help="add adapters of one backbone: an adapter")
    one.add_argument("adapters", nargs="+", metavar="FOLDER", help="adapter folders")
    one.add_argument("--weights", nargs="+", type=float, help="a factor for each; by default their mean is written")
    one.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write")
    one.set_defaults(action=_merge_adapters)

    one = commands.add_parser("merge", help="fold an adapter into its backbone: a checkpoint for plain LAVIS")
    one.add_argument("adapter", metavar="FOLDER", help="an adapter folder; its gate.form must be none")
    one.add_argument("output", metavar="FILE", help="the checkpoint to write, e.g. merged.pth")
    _add_sources(one)
    one.set_defaults(action=_merge)

    one = commands.add_parser("export", help="write a tuned model as other libraries load it: peft, transformers")
    one.add_argument("adapter", metavar="ADAPTER", help="an adapter folder; its gate.form must be none")
    one.add_argument("output", metavar="FOLDER", help="the folder to write")
    one.add_argument("--to", required=True, metavar="FORMAT", help="peft (a LoRA) or transformers (a merged model)")
    one.add_argument("--rank", type=int, help="of peft's LoRA, to make it smaller; the adapter's own otherwise")
    _add_sources(one)
    one.set_defaults(action=_export)

    one = commands.add_parser("push", help="share an adapter on the Hugging Face hub")
    one.add_argument("adapter", metavar="FOLDER", help="an adapter folder")
    one.add_argument("repository", metavar="USER/NAME", help="where to; made if it is not there")
    one.add_argument("--private", action="store_true", help="make it a private one")
    one.set_defaults(action=_push)


def _add_rank_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """What is done with an adapter that was trained with model.mode_approx.nested."""
    one = commands.add_parser("truncate", help="cut an adapter of model.mode_approx.nested to its first components")
    one.add_argument("adapter", metavar="FOLDER", help="an adapter folder")
    one.add_argument("--rank", type=int, required=True, help="how many components, e.g. 16")
    one.add_argument("--out", metavar="FOLDER", help="the folder to write; FOLDER_rankN by default")
    one.set_defaults(action=_truncate)

    one = commands.add_parser("rank", help="find the rank that is enough, of a finished run that was nested")
    one.add_argument("run", metavar="RUN", help="folder of the run; adapter_auto, ranks.json and ranks.png go there")
    _add_options(one)
    one.set_defaults(action=_rank)


def _add_run_arguments(parser: argparse.ArgumentParser, evaluate: bool) -> None:
    """The arguments of train and evaluate, and what is done with them."""
    parser.add_argument("--cfg-path", required=True, help="project YAML, e.g. projects/aurora/flickr_ret.yaml")
    _add_options(parser)
    parser.set_defaults(action=_run, evaluate=evaluate)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    """Where the parts of a backbone come from that an adapter does not name."""
    parser.add_argument("--pretrained", help="file or URL of the backbone, instead of that of the model's type")
    parser.add_argument("--tokenizer", help="hub name or folder of the tokenizer, likewise")
    parser.add_argument("--med-config-path", help="configuration of the text tower, likewise")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--options", nargs="+", metavar="KEY=VALUE", help="override keys of the YAML, e.g. run.max_epoch=2"
    )


def _run(args: argparse.Namespace) -> None:
    from lavis_aurora.project import load_config
    from lavis_aurora.training.start import run_config

    cfg = load_config(args.cfg_path, args.options, args.evaluate)
    folder = run_config(cfg)
    if cfg.run_cfg.rank is not None and not cfg.run_cfg.evaluate:
        _draw_ranks(folder)


def _draw_ranks(folder: Path) -> None:
    """The picture of a run's ranks, beside their table."""
    if int(os.environ.get("RANK", 0)) == 0:
        from lavis_aurora.analysis.ranks import draw_ranks

        draw_ranks(folder)


def _rank(args: argparse.Namespace) -> None:
    from lavis_aurora.training.start import find_rank

    _draw_ranks(find_rank(args.run, args.options))


def _check(args: argparse.Namespace) -> None:
    from lavis_aurora.project import load_config
    from lavis_aurora.training.data import check_data

    check_data(load_config(args.path, args.options), args.decode)


def _inspect(args: argparse.Namespace) -> None:
    from lavis_aurora.cli import inspect

    _show(inspect(args.path))


def _diff(args: argparse.Namespace) -> None:
    from lavis_aurora.cli import diff

    _show(diff(args.first, args.second))


def _merge_adapters(args: argparse.Namespace) -> None:
    from lavis_aurora.adapters.arithmetic import merge_adapters

    _show("\n".join(merge_adapters(args.adapters, args.out, args.weights)))


def _merge(args: argparse.Namespace) -> None:
    from lavis_aurora.models.export import merge

    _show(merge(args.adapter, args.output, **_sources(args)))


def _export(args: argparse.Namespace) -> None:
    from lavis_aurora.models.export import export

    _show(export(args.adapter, args.to, args.output, args.rank, **_sources(args)))


def _sources(args: argparse.Namespace) -> dict[str, str | None]:
    return {key: getattr(args, key) for key in ("pretrained", "tokenizer", "med_config_path")}


def _push(args: argparse.Namespace) -> None:
    from lavis_aurora.adapters.card import push_adapter

    _show(f"{push_adapter(args.adapter, args.repository, args.private)} names this adapter")


def _truncate(args: argparse.Namespace) -> None:
    from lavis_aurora.cli import truncate

    _show(truncate(args.adapter, args.rank, args.out))


def _targets(args: argparse.Namespace) -> None:
    from lavis_aurora.cli import targets

    _show(targets(args.model, args.model_type))


def _compare(args: argparse.Namespace) -> None:
    from lavis_aurora.analysis.compare import compare

    _show(compare(args.results, args.benchmark, args.table))


def _convert(args: argparse.Namespace) -> None:
    from lavis_aurora.data.convert import main

    main(args.arguments)


def _show(text: str) -> None:
    """Print what may hold names from files."""
    from lavis_aurora.common.errors import printable

    print(printable(text, keep="\n"))


def configs(names: Sequence[str] = (), folder: str = ".") -> str:
    """List the project YAMLs, or copy those named to a folder; what was done, as text.

    Raises:
        AuroraError: no such project, or a file is there already; none is copied then.
    """
    known = {path.stem: path for path in sorted(PROJECTS.glob("*.yaml"))}
    if not names:
        width = max(map(len, known))
        lines = ((name, textwrap.wrap(_summary(path), 100)) for name, path in known.items())
        return "\n".join(f"{name:<{width}}  " + f"\n{'':<{width}}  ".join(words) for name, words in lines)
    from lavis_aurora.common.errors import AuroraError, did_you_mean

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
