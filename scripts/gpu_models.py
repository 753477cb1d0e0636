"""The parts of scripts/check_gpu.py that need LAVIS: BLIP's kernels, training, memory, and time beside other ways."""

from __future__ import annotations

import copy
import gc
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, Optional

import torch
from gpu_report import DTYPES, MEASURED, SKIPPED, Row, Setting, relative_error, relative_errors, row
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

import bench_eval  # noqa: E402
import bench_train  # noqa: E402
from bench_step import samples  # noqa: E402
from gpu_blip import check_kernels, model_of  # noqa: E402
from runs import task_of, train_epoch, training_state  # noqa: E402

from lavis_aurora.adapters.companions import adapter_parameters  # noqa: E402
from lavis_aurora.encoders.towers import compile_layers  # noqa: E402
from lavis_aurora.training.loop import TrainingState  # noqa: E402
from lavis_aurora.training.order import random_state, set_random_state  # noqa: E402

# All tunings; frozen-flow trains the inputs of a frozen backbone alone.
TUNINGS = ("aurora-64", "aurora-all-64", "lora-32", "uniadapter-128", "full", "frozen-flow")
TOWERS = ("visual_encoder", "text_encoder", "text_decoder")
GPU_TESTS = ("tests/training/test_finite.py", "tests/models/test_transfer.py")


def on_device(task: str, setting: Setting, count: int) -> list[dict[str, Any]]:
    """So many batches, on the device."""
    batch = 2 if setting.tiny else 8
    return [samples(task, batch, setting.size, step, str(setting.device)) for step in range(count)]


def started(task: str, model: nn.Module, batches: list[dict[str, Any]], precision: str, folder: str) -> TrainingState:
    """A run of the loop that trains, with the scaler that it has for float16."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05)
    name = "vqa_aurora" if task == "vqa" else "retrieval_aurora"
    state = training_state(task_of(name), model, batches, Path(folder), optimizer)
    state.autocast = DTYPES[precision]
    if precision == "fp16":
        # From less than torch's 65536, so that few steps suffice to find the scale.
        state.scaler = torch.amp.GradScaler(batches[0]["image"].device.type, init_scale=2.0**10)
    return state


def check_training(setting: Setting) -> Iterator[Row]:
    """Steps of each way of tuning, by the loop of a run: with a scaler in float16, without one in bfloat16."""
    for task, methods in (("retrieval", TUNINGS), ("vqa", TUNINGS[:1])):
        for method in methods:
            try:
                model = model_of(task, method, setting, dropout=None).to(setting.device)
                for precision in setting.precisions[1:]:
                    yield _trained(task, method, precision, model, setting)
            except torch.OutOfMemoryError:
                yield Row(f"{task}, {method}", SKIPPED, "more memory is needed than the GPU has")


def _trained(task: str, method: str, precision: str, model: nn.Module, setting: Setting) -> Row:
    adapter = {id(p) for _, p in adapter_parameters(model)}
    inside = {
        name: p for name, p in model.named_parameters() if name.partition(".")[0] in TOWERS and id(p) not in adapter
    }
    frozen = {name: p.detach().clone() for name, p in inside.items() if not p.requires_grad}
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    with tempfile.TemporaryDirectory() as folder:
        losses = train_epoch(
            started(task, model, on_device(task, setting, 2 if setting.tiny else 4), precision, folder)
        )
    moved = [not torch.equal(p, then) for p, then in zip((p for p in model.parameters() if p.requires_grad), before)]
    changed = [name for name, then in frozen.items() if not torch.equal(inside[name], then)]
    finite = all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)
    found = f"loss {losses['loss']:.3g}, {sum(moved)} of {len(moved)} trained tensors moved, {len(changed)} frozen"
    holds = losses["loss"] > 0 and finite and not changed and any(moved)
    return row(f"{task}, {method}, {precision}", holds, found, "some, 0 frozen")


def losses_and_gradients(model: nn.Module, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Losses of the batches, and the sum of their gradients."""
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = model(batch)["loss"]
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": torch.stack(losses), **gradients}


def _same(check: str, found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> Row:
    errors = relative_errors(found, expected, "loss")
    worst = max(errors, key=lambda name: errors[name])
    return row(check, errors[worst] <= bound, f"{errors[worst]:.1e} ({worst})", f"{bound:.1e}")


def check_checkpointing(setting: Setting) -> Iterator[Row]:
    """What is computed again backward: layers of the vision tower, and a batch in parts, with what is dropped."""
    batches, expected, most = on_device("retrieval", setting, 1), {}, 0.0
    cuda = setting.device.type == "cuda"
    layers = 2 if setting.tiny else 12
    ways = {"all kept": {}, "layers": {"checkpointed": layers}, "a batch in parts": {"mini_batch": 1}}
    for name, built in ways.items():
        model = model_of("retrieval", "aurora-64", setting, **built).to(setting.device)
        if cuda:
            before = held(setting.device)  # nothing of the model before it
            torch.cuda.reset_peak_memory_stats()
        found = losses_and_gradients(model, batches)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else 0.0
        found = {key: value.detach().cpu() for key, value in found.items()}
        if not built:
            expected, most = found, peak
            continue
        yield _same(f"{name}: losses and gradients as without", found, expected, 1e-4)
        if cuda:
            yield row(f"{name}: peak above the model, MB", peak < most, f"{peak:.0f}", f"below {most:.0f}")
    if not cuda:
        yield Row("peak memory", SKIPPED, "a GPU's alone is counted")
    yield _replayed(setting)


def _replayed(setting: Setting) -> Row:
    """Dropout of a batch in parts, under autocast: were it drawn anew, each backward pass had another gradient."""
    model = model_of("retrieval", "aurora-64", setting, dropout=0.3, mini_batch=1).to(setting.device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.autocast(setting.device.type, dtype=DTYPES[setting.precisions[-1]]):
        loss = model(on_device("retrieval", setting, 1)[0])["loss"]
    both = []
    for keep in (True, False):
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, retain_graph=keep)
        both.append({"loss": loss.detach(), **{n: g for n, g in zip(trained, gradients) if g is not None}})
    return _same("a batch in parts: what is dropped is dropped again", both[1], both[0], 1e-2)


def check_compile(setting: Setting) -> Iterator[Row]:
    """Compiled layers, as run.compile has them."""
    batches = on_device("retrieval", setting, 1)
    model = model_of("retrieval", "aurora-64", setting).to(setting.device)
    expected = losses_and_gradients(copy.deepcopy(model), batches)
    # A C++ compiler's minutes would say nothing of a GPU's.
    compile_layers(model, **({} if setting.device.type == "cuda" else {"backend": "aot_eager"}))
    torch._dynamo.utils.counters.clear()
    yield _same("losses and gradients as without", losses_and_gradients(model, batches), expected, 1e-3)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    yield row("breaks of a graph", not breaks, str(breaks), "0")


def check_resume(setting: Setting) -> Iterator[Row]:
    """Random numbers of the device after a resume: what is dropped is dropped again, and is other without them."""
    model = model_of("retrieval", "aurora-64", setting, dropout=0.3).to(setting.device)
    first, rest = (on_device("retrieval", setting, 4)[part] for part in (slice(2), slice(2, 4)))

    def go_on(restored: Optional[dict[str, Any]]) -> dict[str, Tensor]:
        resumed, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
        again = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=1e-4)
        again.load_state_dict(state)
        if restored is not None:
            set_random_state(restored)
        return losses_and_gradients(resumed, rest)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for batch in first:
        model(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    file = io.BytesIO()
    torch.save(random_state(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    yield row(
        "state of the device in a checkpoint", setting.device.type != "cuda" or "cuda" in saved, ", ".join(saved)
    )
    expected = go_on(None)
    yield _same("losses and gradients after a resume", go_on(saved), expected, 1e-3)
    other = relative_error(go_on(None)["loss"], expected["loss"])
    yield row("loss with other random numbers", other > 1e-6, f"{other:.1e}", "another")


def held(device: torch.device) -> int:
    """Bytes of the tensors that are alive: a GPU's by its allocator, a CPU's by the garbage collector."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    alive = {}
    for x in gc.get_objects():
        if type(x) in (Tensor, nn.Parameter):
            with suppress(RuntimeError):  # what the compiler keeps of a tensor has no size
                alive[x.data_ptr()] = x.untyped_storage().nbytes()
    return sum(alive.values())


def check_memory(setting: Setting) -> Iterator[Row]:
    """What steps leave behind, and what a model does."""
    start = held(setting.device)
    model = model_of("retrieval", "aurora-64", setting).to(setting.device)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        batches = on_device("retrieval", setting, 3)
        state = started("retrieval", model, batches, setting.precisions[-1], folder)
        train_epoch(state)
        after = held(setting.device)
        state.step, state.epoch = 0, 1
        train_epoch(state)
    more = held(setting.device) - after
    yield row("more after three further steps, bytes", more <= 2**20, str(more), str(2**20))
    del model, state, batches
    # Workspaces of matrix products stay.
    left = held(setting.device) - start
    yield row("left by a model that is gone, bytes", left <= size // 10, str(left), f"{size // 10} (a tenth of it)")


def check_gpu_tests(setting: Setting) -> Iterator[Row]:
    """Tests that are skipped where there is no GPU: nothing waits for it in between."""
    if setting.device.type != "cuda":
        yield Row("tests that need a GPU", SKIPPED, "there is none")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *GPU_TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
    yield row(" ".join(GPU_TESTS), done.returncode == 0 and "skipped" not in last, last, "all pass")


def check_time(setting: Setting) -> Iterator[Row]:
    """A step of each way of tuning, by scripts/bench_train.py."""
    methods = (
        ["aurora-64", "frozen-flow"]
        if setting.tiny
        else ["aurora-64", "lora-32", "uniadapter-512", "full", "frozen-flow"]
    )
    batch, steps, warmup = (2, 1, 1) if setting.tiny else (16, 5, 3)
    words = f"--tasks retrieval --rounds 1 --batch {batch} --steps {steps} --warmup {warmup} --size {setting.size}"
    words += f" --device {setting.device.type}" + (" --amp" if setting.device.type == "cuda" else "")
    unit: dict[str, Any] = {}  # the first that is measured: Aurora's, where it has room
    for method in methods:  # one by one: what is measured is said before the time is up, or the memory
        args = bench_train.make_parser().parse_args([*words.split(), "--methods", method])
        check = f"a step of {args.batch}: {bench_train.method_name(method)}"
        try:
            with redirect_stdout(sys.stderr):  # its progress
                one = bench_train.run_all(args)["retrieval"][method]
        except SystemExit as error:
            if "OutOfMemoryError" not in str(error):
                raise
            yield Row(check, SKIPPED, "more memory is needed than the GPU has")
            continue
        unit = unit or {**one, "of": bench_train.method_name(method)}
        times, memory = one["seconds"] / unit["seconds"], one["memory"] / unit["memory"]
        found = f"{one['seconds']:.3g} s ({times:.2f} x {unit['of']}), {one['memory'] / 1e6:,.0f} MB ({memory:.2f} x)"
        yield Row(check, MEASURED, found)


def check_reranking(setting: Setting) -> Iterator[Row]:
    """LAVIS's way and ours, by scripts/bench_eval.py; always BLIP base."""
    words = f"--kinds images --k {2 if setting.tiny else 128} --rows 1 --runs 1 --device {setting.device.type}"
    args = bench_eval.make_parser().parse_args([*words.split(), "--threads", str(os.cpu_count())])
    found = bench_eval.summarize(bench_eval.measure(args))["images"]
    for side in bench_eval.IMPLEMENTATIONS[:2]:  # without merged tokens
        yield Row(f"pairs per second, {side}", MEASURED, f"{found[side]['pairs_per_second']:.1f}")
    difference, spread = found["max_score_difference"], found["score_deviation"]
    # Both sides compute in single precision, in sums of other orders.
    yield row("largest difference of scores", difference <= 1e-3 * max(1, spread), f"{difference:.1e}", "1e-3")


PARTS = {
    "BLIP's kernels": check_kernels,
    "training": check_training,
    "checkpointing": check_checkpointing,
    "resume": check_resume,
    "memory": check_memory,
    "tests": check_gpu_tests,
    "time": check_time,
    "reranking": check_reranking,
    "compile": check_compile,  # last: how long it takes is the least known
}
