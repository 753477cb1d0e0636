"""Commands of ``lavis-aurora`` about what is there already: adapters, ranks, indexes of pictures, and the page.

Like lavis_aurora_cli, this stands beside the package, and imports what a command needs when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def add_search_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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


def _add_model_arguments(parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None]) -> None:
    """Which model, and what is done."""
    parser.add_argument("--adapter", metavar="FOLDER", help="of an adapter; the model is then the one it is of")
    parser.add_argument("--model-type", help="e.g. coco, or tiny; base by default")
    _add_sources(parser)
    parser.add_argument("--frames", type=int, metavar="N", help="of each clip; 8, or as the adapter was tuned")
    parser.add_argument("--device", default="auto", help="cpu or cuda; a GPU where there is one, by default")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    parser.set_defaults(action=action)


SOURCES = ("pretrained", "tokenizer", "med_config_path")
MODEL_ARGUMENTS = ("adapter", "model_type", *SOURCES, "frames", "device")


def _model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(args, key) for key in MODEL_ARGUMENTS}


def _index(args: argparse.Namespace) -> None:
    from lavis_aurora.search.commands import index

    show(index(args.folder, args.out, args.retry_broken, args.json, **_model_arguments(args)))


def _search(args: argparse.Namespace) -> None:
    from lavis_aurora.search.commands import search

    query = {key: getattr(args, key) for key in ("image", "plus", "minus", "top", "rerank", "itc_weight", "where")}
    show(search(args.index, args.text, args.json, args.sheet, args.open, query, **_model_arguments(args)))


def _answer(args: argparse.Namespace) -> None:
    from lavis_aurora.search.commands import answer

    files = (args.image, args.images, args.answers, args.out)
    show(answer(args.questions, *files, args.json, **_model_arguments(args)))


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
    from lavis_aurora.search.commands import check_page

    check_page(args.index, args.adapter)
    command = app_command(args)
    os.execv(command[0], command)


def add_adapter_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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

    one = commands.add_parser("export", help="write a tuned model for other libraries: peft, transformers, ONNX")
    one.add_argument("adapter", metavar="ADAPTER", help="an adapter folder; its gate.form must be none")
    one.add_argument("output", metavar="FOLDER", help="the folder to write")
    one.add_argument("--to", required=True, metavar="FORMAT", help="peft (a LoRA), or merged: transformers, onnx")
    one.add_argument("--rank", type=int, help="of peft's LoRA, to make it smaller; the adapter's own otherwise")
    _add_sources(one)
    one.set_defaults(action=_export)

    one = commands.add_parser("push", help="share an adapter on the Hugging Face hub")
    one.add_argument("adapter", metavar="FOLDER", help="an adapter folder")
    one.add_argument("repository", metavar="USER/NAME", help="where to; made if it is not there")
    one.add_argument("--private", action="store_true", help="make it a private one")
    one.set_defaults(action=_push)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    """Where the parts of a backbone come from that an adapter does not name."""
    parser.add_argument("--pretrained", help="file or URL of the backbone, instead of that of the model's type")
    parser.add_argument("--tokenizer", help="hub name or folder of the tokenizer, likewise")
    parser.add_argument("--med-config-path", help="configuration of the text tower, likewise")


def _sources(args: argparse.Namespace) -> dict[str, str | None]:
    return {key: getattr(args, key) for key in SOURCES}


def _diff(args: argparse.Namespace) -> None:
    from lavis_aurora.cli import diff

    show(diff(args.first, args.second))


def _merge_adapters(args: argparse.Namespace) -> None:
    from lavis_aurora.adapters.arithmetic import merge_adapters

    show("\n".join(merge_adapters(args.adapters, args.out, args.weights)))


def _merge(args: argparse.Namespace) -> None:
    from lavis_aurora.models.export import merge

    show(merge(args.adapter, args.output, **_sources(args)))


def _export(args: argparse.Namespace) -> None:
    from lavis_aurora.models.export import export

    show(export(args.adapter, args.to, args.output, args.rank, **_sources(args)))


def _push(args: argparse.Namespace) -> None:
    from lavis_aurora.adapters.card import push_adapter

    show(f"{push_adapter(args.adapter, args.repository, args.private)} names this adapter")


def add_rank_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """What is done with an adapter that was trained with model.mode_approx.nested."""
    one = commands.add_parser("truncate", help="cut an adapter of model.mode_approx.nested to its first components")
    one.add_argument("adapter", metavar="FOLDER", help="an adapter folder")
    one.add_argument("--rank", type=int, required=True, help="how many components, e.g. 16")
    one.add_argument("--out", metavar="FOLDER", help="the folder to write; FOLDER_rankN by default")
    one.set_defaults(action=_truncate)

    one = commands.add_parser("rank", help="find the rank that is enough, of a finished run that was nested")
    one.add_argument("run", metavar="RUN", help="folder of the run; adapter_auto, ranks.json and ranks.png go there")
    add_options(one)
    one.set_defaults(action=_rank)


def _truncate(args: argparse.Namespace) -> None:
    from lavis_aurora.cli import truncate

    show(truncate(args.adapter, args.rank, args.out))


def _rank(args: argparse.Namespace) -> None:
    from lavis_aurora.training.start import find_rank

    show_ranks(find_rank(args.run, args.options))


def show_ranks(folder: Path) -> None:
    """The picture of a run's ranks, beside their table."""
    if int(os.environ.get("RANK", 0)) == 0:
        from lavis_aurora.analysis.ranks import draw_ranks

        draw_ranks(folder)


def add_options(parser: argparse.ArgumentParser) -> None:
    words = "override keys of the YAML, e.g. run.max_epoch=2"
    # Given twice, both count: argparse alone would forget the first.
    parser.add_argument("--options", action="extend", nargs="+", metavar="KEY=VALUE", help=words)


def show(text: str) -> None:
    """Print what may hold names from files."""
    from lavis_aurora.common.errors import printable

    print(printable(text, keep="\n"))
