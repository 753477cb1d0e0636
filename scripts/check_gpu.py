"""The package on a GPU, against the CPU: what is computed, how training goes, what it holds, and how long it takes.

    bash scripts/check_gpu.sh                    # on the GPU; BLIP base with random weights
    bash scripts/check_gpu.sh --device cpu       # tries this program itself, on tiny models

The first parts need torch and safetensors alone, the others LAVIS; of what cannot run it is said why. A table is
printed; with machine and versions it is written to ``--out``. The exit status is 0 where everything held, 1 where
something did not or there was no time for it, and 2 without a GPU or without torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

START = time.monotonic()  # imports count too
try:
    import safetensors  # noqa: F401
    import torch
except ImportError as error:
    print(
        f"check_gpu: {sys.executable} cannot import torch and safetensors ({error}): nothing was checked; run "
        f"scripts/setup_env.sh, or set PYTHON to an interpreter that has them",
        file=sys.stderr,
    )
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]


from gpu_report import FAILED, SKIPPED, Row, Setting  # noqa: E402

Part = Callable[[Setting], Iterator[Row]]
BLIP = "parts with BLIP"


class OutOfTime(Exception):
    """The limit has passed."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Context that :class:`OutOfTime` leaves after so many seconds."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def all_parts() -> tuple[dict[str, Part], dict[str, str]]:
    """The parts that can run here, and why others cannot, by name. With LAVIS at hand all must: else a part fails.

    The package is imported here: without a GPU that is known before.
    """
    import gpu_kernels

    parts: dict[str, Part] = dict(gpu_kernels.PARTS)
    try:
        import gpu_models
    except Exception as error:  # whatever a library raises that does not fit the others
        fault = error
        if find_spec("lavis") is not None:

            def broken(_setting: Setting) -> Iterator[Row]:
                raise fault

            return {**parts, BLIP: broken}, {}
        reason = " ".join(str(error).split())
        return parts, {BLIP: f"LAVIS cannot be imported: {reason}"}
    return parts | gpu_models.PARTS, {}


def run_parts(
    parts: dict[str, Part], setting: Setting, limit: float, start: float | None = None
) -> tuple[list[Row], dict[str, float]]:
    """Rows of all parts, printed as they come, and how long each part took.

    A part that breaks, or that there is no time for, is a row of its own.

    Args:
        parts: by name.
        setting: where and how large.
        limit: seconds in all, from ``start`` on.
        start: by time.monotonic; now by default.
    """
    rows: list[Row] = []
    seconds, start = {}, time.monotonic() if start is None else start
    print("| part | check | found | allowed | |\n| --- | --- | --- | --- | --- |", flush=True)

    def note(part: str, one: Row) -> None:
        one.part = part
        rows.append(one)
        print(f"| {one.part} | {one.check} | {one.found} | {one.allowed} | {one.status} |", flush=True)

    for name, part in parts.items():
        began = time.monotonic()
        try:
            with limited(limit - (began - start)):
                for found in part(setting):
                    note(name, found)
        except OutOfTime:
            note(name, Row("all of it", FAILED, f"not done within {limit:.0f} s"))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            note(name, Row("runs", FAILED, " ".join(f"{type(error).__name__}: {error}".split())[-300:]))
        seconds[name] = round(time.monotonic() - began, 2)
    return rows, seconds


def description(setting: Setting) -> dict[str, object]:
    """The machine and the versions."""
    from lavis_aurora.common.summary import machine, versions

    found: dict[str, object] = {**machine(setting.device), **versions()}
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        found |= {
            "gpu_memory_gb": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", choices=("base", "tiny"), help="of the models (default: base, on a CPU tiny)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="of the table's first column")
    parser.add_argument("--limit", type=float, default=600, help="seconds in all (default: %(default)s)")
    parser.add_argument("--out", default="output/check_gpu.json", help="default: %(default)s")
    return parser


def main() -> int:
    parser = arguments()
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            f"check_gpu: torch {torch.__version__} sees no GPU: nothing was checked; --device cpu tries this program",
            file=sys.stderr,
        )
        return 2
    try:
        parts, missing = all_parts()
    except ImportError as error:
        print(f"check_gpu: {error}: nothing was checked", file=sys.stderr)
        return 2
    from lavis_aurora.common.files import write_text  # of the package, which could be imported

    if unknown := set(args.only or ()) - set(parts):
        reasons = "".join(f"; {name}: {reason}" for name, reason in missing.items())
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; known: {', '.join(parts)}{reasons}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger().setLevel(logging.ERROR)  # random weights are meant
    setting = Setting(torch.device(args.device), args.size or ("base" if args.device == "cuda" else "tiny"))
    # What is compared in single precision is computed in it, whatever the environment says; convolutions too.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # Before the parts: a GPU that has failed may tell nothing.
    about = {"device": args.device, "size": setting.size, **description(setting)}
    if "bf16" not in setting.precisions:
        missing["bf16"] = "the device does not compute in it"
    rows, seconds = run_parts({name: parts[name] for name in args.only or parts}, setting, args.limit, START)
    if not args.only:
        rows += [Row("all of it", SKIPPED, reason, part=name) for name, reason in missing.items()]
    failed = sum(one.status == FAILED for one in rows)
    content = {"failed": failed, "about": {**about, "seconds": seconds}, "rows": [asdict(one) for one in rows]}
    write_text(Path(args.out), json.dumps(content, indent=1) + "\n")
    print(*(f"\n{name}: skipped, {reason}" for name, reason in missing.items()))
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    skipped = sum(one.status == SKIPPED for one in rows)
    print(f"\n{len(rows)} checks: {failed} failed, {skipped} skipped, {sum(seconds.values()):.0f} s; see {args.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
