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
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

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

    _add_search_commands(commands)

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


def _add_search_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """index, search and answer."""
    one = commands.add_parser("index", help="make or update an index of a folder's pictures and clips")
    one.add_argument("folder", metavar="FOLDER", help="of pictures and clips, with folders in it")
    one.add_argument("--out", metavar="INDEX", help="where the index is kept; FOLDER/.aurora_index by default")
    one.add_argument("--retry-broken", action="store_true", help="try files again that could not be read")
    _add_model_arguments(one, _index)

    one = commands.add_parser("search", help="pictures and clips of an index, by words or by a picture")
    one.add_argument("index", metavar="INDEX", help="an index, or the folder that it is in")
    one.add_argument("text", metavar="TEXT", nargs="?", default="", help="e.g. 'two dogs on a beach'")
    one.add_argument("--image", metavar="FILE", help="what is like this picture or clip; with TEXT: and like it")
    one.add_argument("--plus", metavar="TEXT", action="append", default=[], help="and like this")
    one.add_argument("--minus", metavar="TEXT", action="append", default=[], help="and unlike this")
    one.add_argument("--top", type=int, default=10, metavar="N", help="hits (default: %(default)s)")
    what = "candidates ranked by ITM too; 0: by ITC alone (default: %(default)s)"
    one.add_argument("--rerank", type=int, default=32, metavar="N", help=what)
    what = "weight of ITC in the scores of those (default: %(default)s)"
    one.add_argument("--itc-weight", type=float, default=1.0, metavar="X", help=what)
    one.add_argument("--where", metavar="SQL", help="e.g. \"kind = 'clip'\" or \"path LIKE 'holiday/%%'\"")
    one.add_argument("--sheet", metavar="PNG", help="write a picture of the hits")
    one.add_argument("--open", action="store_true", help="show a picture of the hits")
    _add_model_arguments(one, _search)

    one = commands.add_parser("answer", help="questions about a picture, or a file of questions")
    one.add_argument("questions", metavar="QUESTION", nargs="+", help="about --image; or a file of questions")
    one.add_argument("--image", metavar="FILE", help="the picture or clip")
    one.add_argument("--images", metavar="FOLDER", help="where the pictures of a file of questions are")
    one.add_argument("--answers", metavar="JSON", help="a list of answers to choose from; else they are generated")
    one.add_argument("--out", metavar="FILE", help="answers of a file: .json as VQAv2's (answers.json), or .csv")
    _add_model_arguments(one, _answer)
    _add_app_command(commands)


def _add_app_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """app."""
    one = commands.add_parser("app", help="a page in the browser: search and ask, adapters side by side")
    one.add_argument("index", metavar="INDEX", nargs="?", help="an index; the demo's pictures without one")
    what = "an adapter beside that of the index, of retrieval or of answers; several may be given"
    one.add_argument("--adapter", metavar="NAME=FOLDER", action="append", default=[], help=what)
    one.add_argument("--device", default="auto", help="cpu or cuda; a GPU where there is one, by default")
    one.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    one.add_argument("--port", type=int, default=8501, help="(default: %(default)s)")
    one.set_defaults(action=_app)


def app_command(args: argparse.Namespace) -> list[str]:
    """What runs the page."""
    page = Path(__file__).with_name("lavis_aurora") / "app.py"
    server = {"address": args.host, "port": args.port, "headless": "true", "maxUploadSize": 20}
    options = {**{f"server.{key}": value for key, value in server.items()}, "server.fileWatcherType": "none"}
    options |= {"browser.gatherUsageStats": "false", "client.toolbarMode": "minimal"}
    words = [f"--{key}={value}" for key, value in options.items()]
    given = [*([args.index] if args.index else []), f"--device={args.device}"]
    given += [f"--adapter={one}" for one in args.adapter]
    return [sys.executable, "-m", "streamlit", "run", str(page), *words, "--", *given]


def _app(args: argparse.Namespace) -> None:
    if find_spec("streamlit") is None:
        from lavis_aurora.common.errors import AuroraError

        raise AuroraError("the page needs Streamlit: pip install streamlit")
    command = app_command(args)
    os.execv(command[0], command)


def _add_model_arguments(parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None]) -> None:
    """Which model, and what is done."""
    parser.add_argument("--adapter", metavar="FOLDER", help="of an adapter; the model is then the one it is of")
    parser.add_argument("--model-type", help="e.g. coco, or tiny; base by default")
    parser.add_argument("--pretrained", help="file or URL of the backbone, instead of that of the type")
    parser.add_argument("--tokenizer", help="hub name or folder of the tokenizer, likewise")
    parser.add_argument("--med-config-path", help="configuration of the text tower, likewise")
    parser.add_argument("--frames", type=int, metavar="N", help="of each clip; 8, or as the adapter was tuned")
    parser.add_argument("--device", default="auto", help="cpu or cuda; a GPU where there is one, by default")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    parser.set_defaults(action=action)


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


MODEL_ARGUMENTS = ("adapter", "model_type", "pretrained", "tokenizer", "med_config_path", "frames", "device")


def _model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(args, key) for key in MODEL_ARGUMENTS}


def _index(args: argparse.Namespace) -> None:
    from lavis_aurora.search.commands import index

    _show(index(args.folder, args.out, args.retry_broken, args.json, **_model_arguments(args)))


def _search(args: argparse.Namespace) -> None:
    from lavis_aurora.search.commands import search

    query = {key: getattr(args, key) for key in ("image", "plus", "minus", "top", "rerank", "itc_weight", "where")}
    _show(search(args.index, args.text, args.json, args.sheet, args.open, query, **_model_arguments(args)))


def _answer(args: argparse.Namespace) -> None:
    from lavis_aurora.search.commands import answer

    files = (args.image, args.images, args.answers, args.out)
    _show(answer(args.questions, *files, args.json, **_model_arguments(args)))


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
