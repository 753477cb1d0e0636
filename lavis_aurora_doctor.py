"""``lavis-aurora doctor``: what is installed, whether it works together, and what to do where it does not.

It runs where the package cannot be imported: this module needs the standard library alone, and what may fail or crash
is tried in a process of its own (:func:`probe`), which says after each stage how that went.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import lavis_aurora_compat as compat

OK, WARNING, ERROR = "ok", "warning", "error"
PYTHONS = ((3, 9), (3, 13))
NEWEST_TORCH = (2, 15)
# Seconds for all stages; the first import after an installation may take a minute.
TIMEOUT = 300
MARK = "lavis-aurora doctor: "
OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")
LAVIS = ("salesforce-lavis", "ammico-lavis")
OTHERS = ("timm", "fairscale", "omegaconf", "safetensors", "pandas", "huggingface-hub", "accelerate", "peft", "spacy")
# How packages are called where their modules have other names.
PACKAGES = {"cv2": OPENCV[0], "PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit-image"}
OPENCV_FOR_NUMPY_2 = "pip install 'opencv-python-headless>=4.10,<5'"
# What an error says, and what then helps.
REMEDIES = {
    "torchvision::nms does not exist": "torch and torchvision are of two builds (CPU, CUDA); install both from one "
    "place: pip install --force-reinstall -c constraints.txt torch torchvision",
    "multiarray failed to import|compiled using NumPy 1|_ARRAY_API": "opencv was built for numpy 1: "
    + ("pip install 'numpy<2'" if sys.version_info < (3, 13) else OPENCV_FOR_NUMPY_2),
    "libGL": f"pip uninstall {' '.join(OPENCV[1:])}; pip install --force-reinstall -c constraints.txt {OPENCV[0]}",
    "required for a normal functioning of this module": f"{compat.BEFORE_US}; or the version that it names",
    "No module named '(lavis|transformers)'": compat.INSTALL_LAVIS,
}


@dataclass
class Finding:
    """What is said of one thing.

    Attributes:
        name, value: what, and its version, place or result.
        status: ok, warning (it may do) or error (it will not).
        remedy: what to type or to change; empty where all is well.
    """

    name: str
    value: str
    status: str = OK
    remedy: str = ""


def examine() -> list[Finding]:
    """Everything, in an order in which the first error is likely to be the cause of those after it."""
    return [_python(), *_versions(), *_places(), *_stages()]


def report(findings: list[Finding], as_json: bool = False) -> str:
    """The findings as text, or as JSON: ``ok`` and ``findings``."""
    if as_json:
        everything = {"ok": not _errors(findings), "findings": [asdict(finding) for finding in findings]}
        return json.dumps(everything, indent=1)
    lines = []
    for one in findings:
        lines.append(f"{one.status:<8} {one.name:<22} {one.value}")
        if one.remedy:
            lines.append(f"{'':<8} -> {one.remedy}")
    count = _errors(findings)
    return "\n".join([*lines, f"{count} error{'s' * (count != 1)}" if count else "no errors: it works here"])


def doctor(as_json: bool = False) -> int:
    """Print the report; the exit status is 1 where there is an error."""
    findings = examine()
    print(report(findings, as_json))
    return int(_errors(findings) > 0)


def _errors(findings: list[Finding]) -> int:
    return sum(finding.status == ERROR for finding in findings)


def _python() -> Finding:
    value = f"{platform.python_version()} at {_short(sys.executable)}, {platform.platform()}"
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return Finding("Python", value)
    return Finding("Python", value, ERROR, "3.9 to 3.13 are supported; `uv venv --python 3.11` makes an environment")


def _version(package: str) -> str:
    """As installed, with the place it came from where that is no registry; empty of one that is not installed."""
    try:
        found = distribution(package)
    except PackageNotFoundError:
        return ""
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    return found.version + (f" from {_short(origin['url'])}" if "url" in origin else "")


def _versions() -> Iterator[Finding]:
    """Versions as installed, and conflicts among them that are known."""
    problems = dict(_conflicts())
    yield _lavis()
    opencv = [name for name in OPENCV if _version(name)] or [OPENCV[0]]
    ours = _version("lavis-aurora")
    yield Finding("lavis-aurora", ours or f"not installed, run from {_short(str(Path(__file__).parent))}")
    for name in ("torch", "torchvision", "transformers", "tokenizers", "numpy", *opencv, "decord", *OTHERS):
        optional = name in ("accelerate", "peft", "spacy")
        if found := _version(name):
            yield Finding(name, found, *problems.get(name, ()))
        elif optional:
            yield Finding(name, "not installed, and not needed")
        else:
            install = compat.INSTALL_LAVIS if name == "transformers" else f"pip install -c constraints.txt {name}"
            yield Finding(name, "not installed", ERROR, install)


def _conflicts() -> Iterator[tuple[str, tuple[str, str]]]:
    """(package, (status, remedy)) of installed versions that do not work, or were not tried, with the others."""
    has = compat.release
    if has("torch") < (2, 6):
        remedy = "pip install -c constraints.txt torch torchvision"
        yield "torch", (ERROR, f"torch.load of older versions can be made to run code: {remedy}")
    if has("torch")[:2] > NEWEST_TORCH:
        tested = ".".join(map(str, NEWEST_TORCH))
        yield "torch", (WARNING, f"newer than tested; {tested} is: pip install 'torch=={tested}.*' torchvision")
    if not (4, 25) <= has("transformers") < (4, 27):
        yield "transformers", (ERROR, f"LAVIS needs 4.25 or 4.26: {compat.INSTALL_LAVIS}")
    if has("huggingface-hub") >= (1,):
        yield "huggingface-hub", (ERROR, "transformers 4.26 needs an older one: pip install 'huggingface-hub<1'")
    installed = [name for name in OPENCV if has(name)]
    for name in installed:
        if has(name) < (4, 10) and has("numpy") >= (2,):
            yield name, (ERROR, "it was built for numpy 1: pip install 'numpy<2', or " + OPENCV_FOR_NUMPY_2)
        elif len(installed) > 1:
            yield name, (WARNING, f"{' and '.join(installed)} share files; uninstall all, then install {OPENCV[0]}")
    if has("accelerate") and not has("safetensors"):
        yield "accelerate", (ERROR, "it needs safetensors: pip install safetensors")
    if has("peft") and has("peft") != (0, 13, 2):
        yield "peft", (WARNING, "tuning: lora is tested with another: pip install peft==0.13.2")


def _lavis() -> Finding:
    """Which of the packages that bring the module lavis, and where it lies."""
    spec = find_spec("lavis")
    if spec is None:
        return Finding("LAVIS", "not installed", ERROR, compat.INSTALL_LAVIS)
    installed = [f"{name} {_version(name)}" for name in LAVIS if _version(name)]
    value = f"{' and '.join(installed) or 'unknown version'} in {_short(str(Path(spec.origin or '').parent))}"
    if installed == ["salesforce-lavis 1.0.2"]:
        return Finding("LAVIS", value)
    return Finding("LAVIS", value, WARNING, f"tested most is 1.0.2, see docs/install.md: {compat.INSTALL_LAVIS}")


def _places() -> Iterator[Finding]:
    """Folders that are read and written."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("TRANSFORMERS_CACHE") or f"{home}/hub"
    cache = Path(hub).expanduser()
    held = "holds" if any(cache.glob("models--bert-base-uncased/snapshots/*")) else "without"
    yield Finding("Hugging Face cache", f"{_short(str(cache))}, {held} bert-base-uncased (tiny models need none)")
    data = os.environ.get("AURORA_DATA")
    if data and not Path(data).expanduser().is_dir():
        yield Finding("AURORA_DATA", _short(data), WARNING, "there is no such folder; name one, or unset it")
    else:
        yield Finding("AURORA_DATA", _short(data) if data else "not set: data are looked for in ./data")


def _short(path: str) -> str:
    """Without the user's name."""
    return path.replace(str(Path.home()), "~")


# Stages, each tried after those before it


def _stages() -> Iterator[Finding]:
    """What the process that tries them says; of one that crashed, the stage at which it did."""
    command = [sys.executable, __file__, "probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
        output, errors, end = done.stdout, done.stderr, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as late:
        output, errors = (str(part or b"", "utf-8", "replace") for part in (late.stdout, late.stderr))
        end = f"no answer within {TIMEOUT} s"
    except OSError as error:
        output, errors, end = "", str(error), "it could not be started"
    said = [json.loads(line[len(MARK) :]) for line in output.splitlines() if line.startswith(MARK)]
    yield from (Finding(**one) for one in said)
    if len(said) < len(STAGES):
        stage = list(STAGES)[len(said)]
        last = " ".join(errors.strip().splitlines()[-1:])
        yield Finding(stage, f"the process ended: {end} {last}".rstrip(), ERROR, _remedy(errors))


def probe() -> None:
    """Try all stages, and print a finding after each, as JSON behind a mark."""
    failed = False
    for name, stage in STAGES.items():
        try:
            if failed and stage is _step:
                finding = Finding(name, "not tried: what it needs does not work", ERROR)
            else:
                finding = Finding(name, stage())
        except BaseException as error:  # noqa: B036 whatever a broken installation raises
            text = " ".join(f"{type(error).__name__}: {error}".split())
            chain = f"{text} {error.__cause__ or ''} {error.__context__ or ''}"
            finding = Finding(name, text[:300], ERROR, _remedy(chain))
        failed |= finding.status == ERROR
        print(f"{MARK}{json.dumps(asdict(finding))}", flush=True)


def _remedy(text: str) -> str:
    """What helps against an error, by what it says; empty if nothing is known."""
    known: Optional[str] = next((remedy for error, remedy in REMEDIES.items() if re.search(error, text)), None)
    absent = re.search(r"No module named '(\w+)", text)
    if known is None and absent:
        return f"pip install -c constraints.txt {PACKAGES.get(absent[1], absent[1])}"
    return known or ""


def _imports(name: str) -> Callable[[], str]:
    def stage() -> str:
        importlib.import_module(name)
        return "can be imported"

    return stage


def _opencv() -> str:
    import cv2  # type: ignore[import-not-found, unused-ignore]
    import numpy

    return f"resizes: {cv2.resize(numpy.ones((4, 4), 'uint8'), (2, 2)).sum()}"


def _torch() -> str:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"CUDA {torch.version.cuda or 'not built in'}, GPUs: {', '.join(names) or 'none'}"


def _torchvision() -> str:
    import torch
    import torchvision  # type: ignore[import-untyped, unused-ignore]

    kept = torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    return f"fits torch: nms keeps {len(kept)} of 1"


def _step() -> str:
    """A step of the tiny retrieval model and answers of the tiny VQA model; their numbers are the same everywhere."""
    import torch

    torch.manual_seed(0)
    images = torch.linspace(0, 60, 2 * 3 * 48 * 48).sin().view(2, 3, 48, 48)
    texts = ["a red circle", "a big blue square and a small star"]
    load = importlib.import_module("lavis_aurora").load_model_and_preprocess
    model = load("blip_retrieval_aurora", "tiny", is_eval=True)[0]
    scores = model.match(images, texts)
    samples: dict[str, Any] = {"image": images, "text_input": texts, "image_id": torch.arange(2)}
    loss = model({**samples, "epoch": 0, "iters": 0, "num_iters_per_epoch": 1})["loss"]
    loss.backward()
    trained = {parameter: parameter.grad for parameter in model.parameters() if parameter.grad is not None}
    gradient = sum(float(grad.abs().sum()) for grad in trained.values())
    before = [parameter.detach().clone() for parameter in trained]
    torch.optim.SGD(trained, lr=0.1).step()
    if not loss.isfinite() or all(torch.equal(*pair) for pair in zip(before, trained)):
        raise RuntimeError(f"the step changes nothing, or the loss is not finite: {float(loss)}")
    vqa = load("blip_vqa_aurora", "tiny", is_eval=True)[0]
    questions = {"image": images, "text_input": ["what color is the circle ?", "how many stars are there ?"]}
    answers = vqa.predict_answers(questions, inference_method="generate")
    sums = f"ITC {float(scores.itc.sum()):.5f}, ITM {float(scores.itm.sum()):.5f}"
    return f"{sums}, loss {float(loss):.5f}, gradient {gradient:.4f}, answers {', '.join(answers)}"


STAGES: dict[str, Callable[[], str]] = {
    "import numpy": _imports("numpy"),
    "import cv2": _opencv,
    "import torch": _torch,
    "import torchvision": _torchvision,
    "import decord": _imports("decord"),
    "import transformers": _imports("transformers.models.bert.modeling_bert"),
    "import lavis": _imports("lavis.models"),
    "import lavis_aurora": _imports("lavis_aurora.models.loading"),
    "step of the tiny model": _step,
}

if __name__ == "__main__":
    if sys.argv[1:] == ["probe"]:
        probe()
    else:
        sys.exit(doctor("--json" in sys.argv))
