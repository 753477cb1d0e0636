"""Rates of every batch: warm-up of any length, and scales of groups, against the plain formulas."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from lavis.common.optims import LinearWarmupCosineLRScheduler, LinearWarmupStepLRScheduler
from omegaconf import OmegaConf
from runs import logged, only_run
from tiny import project_yaml, refused, tiny_model

from lavis_aurora.adapters.switching import trained_groups
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.training.checkpoints import read_checkpoint
from lavis_aurora.training.rates import LongWarmup, OptimizedRunner, ScaledRates, scale_rates
from lavis_aurora.training.runner import AuroraRunner
from lavis_aurora_cli import train

EPOCHS, BATCHES = 4, 5
RATES = {"init_lr": 1.0, "min_lr": 0.1}


def rates(cls: type, long: bool = True, **settings) -> list[float]:
    """The rate of each batch of a run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=9.0)
    schedule = cls(optimizer, max_epoch=EPOCHS, **RATES, **settings)
    schedule = LongWarmup(schedule, BATCHES) if long else schedule
    found = []
    for epoch in range(EPOCHS):
        for step in range(BATCHES):
            schedule.step(cur_epoch=epoch, cur_step=step)
            found.append(optimizer.param_groups[0]["lr"])
    return found


def decayed(cls: type, epoch: int) -> float:
    if cls is LinearWarmupStepLRScheduler:
        return max(0.1, 0.5**epoch)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS))


@pytest.mark.parametrize("cls", [LinearWarmupCosineLRScheduler, LinearWarmupStepLRScheduler])
@pytest.mark.parametrize("start", [-1.0, 0.05])
@pytest.mark.parametrize("warmup", [0, 3, 5, 8, 15, 40])
def test_the_rate_of_every_batch(cls, start, warmup):
    settings = {"warmup_steps": warmup, "warmup_start_lr": start, "decay_rate": 0.5}
    first = start if start >= 0 else 1.0
    rising = [first + (1.0 - first) * n / max(warmup, 1) for n in range(EPOCHS * BATCHES)]
    expected = [min(1.0, rate, decayed(cls, n // BATCHES)) for n, rate in enumerate(rising)]
    assert rates(cls, **settings) == pytest.approx(expected)
    if warmup <= BATCHES:
        assert rates(cls, **settings) == rates(cls, long=False, **settings), "LAVIS's, where that is whole"


def test_a_warmup_longer_than_the_run_is_said(caplog):
    rates(LinearWarmupCosineLRScheduler, warmup_steps=20)
    assert not caplog.records
    rates(LinearWarmupCosineLRScheduler, warmup_steps=21)
    [record] = caplog.records
    assert record.message.startswith("run.warmup_steps: 21 are more than the 20 batches of the run")


RUN = {"max_epoch": 3, "warmup_steps": 5, "warmup_lr": 0.0, "init_lr": 1e-3, "valid_splits": [], "test_splits": []}


def test_a_run_warms_up_over_epochs(tmp_path):
    """Epochs of two batches, of each the last rate."""
    train(["--cfg-path", str(project_yaml(tmp_path, run=RUN))])
    found = [entry["train_lr"] for entry in logged(only_run(tmp_path), "train_lr")]
    assert found == pytest.approx([0.2e-3, 0.6e-3, 0.25e-3]), "the cosine of the third epoch is below the warm-up"


@pytest.mark.slow
def test_resumed_in_the_midst_of_its_warmup_a_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    """With groups at rates of their own beside those without."""
    original = AuroraRunner._after_step

    def killed(self, epoch, done):
        original(self, epoch, done)
        if (epoch, done) == (1, 1):
            raise KeyboardInterrupt

    run = {**RUN, "batch_size_train": 2, "warmup_steps": 8}
    run |= {"checkpoint_every": 1, "resume": "auto", "save_queue": True, "lr_scales": {"heads": 0.1, "gate": 3.0}}
    ends = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        yaml = project_yaml(tmp_path / name, run=run)
        if name == "killed":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(AuroraRunner, "_after_step", killed)
                train(["--cfg-path", str(yaml)])
        train(["--cfg-path", str(yaml)])
        folder = only_run(tmp_path / name)
        lines = [line for line in (folder / "log.txt").read_text().splitlines() if line.startswith('{"train_epoch')]
        state = read_checkpoint(folder / "checkpoint_latest.pth")
        ends.append(([json.loads(line) for line in lines], state["model"]))
    (logs, model), (other_logs, other) = ends
    assert logs == other_logs
    assert all(torch.equal(value, other[key]) for key, value in model.items())


SCALED = {"heads": 0.1, "slot factors P": 4.0, "gate": 0.1}


def groups_of(model, **scales: float) -> list[dict]:
    """Groups of AdamW over a model, decayed and not, as LAVIS makes them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(decayed + [{"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}])
    scale_rates(optimizer, model, scales)
    return optimizer.param_groups


def test_every_parameter_is_in_one_group_of_its_scale():
    model = tiny_model()
    expected = {id(p): SCALED.get(group, 1.0) for group, ps in trained_groups(model).items() for p in ps}
    found = [(p, group) for group in groups_of(model, **SCALED) for p in group["params"]]
    assert len(found) == len(expected)
    assert {id(p): group.get("lr_scale", 1.0) for p, group in found} == expected
    assert all(group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0) for p, group in found)
    assert set(expected.values()) == {0.1, 1.0, 4.0}


def test_without_scales_the_groups_are_lavis_own():
    model = tiny_model()
    assert [set(group) & {"lr_scale"} for group in groups_of(model)] == [set(), set()]


def test_a_group_that_is_not_trained_is_refused():
    with pytest.raises(AuroraError, match="run.lr_scales: .* nothing called 'head'; did you mean 'heads'"):
        groups_of(tiny_model(), head=0.1)
    with pytest.raises(AuroraError, match=r"'gate'.*what it trains: .*heads"):
        groups_of(tiny_model(gate={"form": "none"}), gate=0.1)


def test_a_negative_scale_is_refused(tmp_path):
    refused(project_yaml(tmp_path, run={"lr_scales": {"heads": -1.0}}), "run.lr_scales.heads", "0 or more")


def test_groups_have_the_schedule_times_their_scale():
    one, other = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [other], "lr_scale": 0.25}], lr=9.0)
    made = LinearWarmupCosineLRScheduler(optimizer, max_epoch=EPOCHS, warmup_steps=8, warmup_start_lr=0.05, **RATES)
    schedule, plain = (
        ScaledRates(LongWarmup(made, BATCHES), optimizer),
        rates(LinearWarmupCosineLRScheduler, warmup_steps=8, warmup_start_lr=0.05),
    )
    found = []
    for epoch in range(EPOCHS):
        for step in range(BATCHES):
            schedule.step(cur_epoch=epoch, cur_step=step)
            found.append([group["lr"] for group in optimizer.param_groups])
    assert found == [[rate, 0.25 * rate] for rate in plain]


def test_a_run_trains_its_groups_at_their_rates(tmp_path):
    run = {"lr_scales": {"heads": 0.0}, "valid_splits": [], "test_splits": []}
    states = []
    for rate in (1e-3, 1e-2):
        (tmp_path / str(rate)).mkdir()
        yaml = project_yaml(tmp_path / str(rate), run={**run, "init_lr": rate})
        train(["--cfg-path", str(yaml), "--options", "run.lr_scales.gate=2.0"])
        states.append(read_checkpoint(only_run(tmp_path / str(rate)) / "checkpoint_latest.pth"))
    groups = {group.get("lr_scale", 1.0): group["lr"] for group in states[1]["optimizer"]["param_groups"]}
    assert groups == {1.0: 1e-2, 0.0: 0.0, 2.0: 2e-2}
    one, other = (state["model"] for state in states)
    assert torch.equal(one["itm_head.weight"], other["itm_head.weight"])
    assert not torch.equal(one["mode_approx.sets.default.P"], other["mode_approx.sets.default.P"])


@pytest.mark.parametrize("everything", [False, True])
def test_weight_decay_may_be_of_vectors_too(tmp_path, everything):
    """LAVIS leaves out vectors and biases: here the gates and the biases of heads."""
    decays = []

    class Noting(AuroraRunner):
        def train_epoch(self, epoch):
            decays.extend((p.ndim, g["weight_decay"]) for g in self.optimizer.param_groups for p in g["params"])
            raise KeyboardInterrupt

    run = {**RUN, "weight_decay": 0.1, "weight_decay_all": everything, "lr_scales": {"heads": 0.1}}
    yaml = project_yaml(tmp_path, run=run)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AuroraRunner, "train_epoch", Noting.train_epoch)
        train(["--cfg-path", str(yaml)])
    assert {dims > 1 for dims, _ in decays} == {False, True}
    assert all(decay == (0.1 if everything or dims > 1 else 0.0) for dims, decay in decays)


@pytest.mark.parametrize(
    ("cpu", "slow"),
    [
        ("flags : fma avx512_vnni", True),
        ("flags : fma avx512_bf16 amx_tile", False),
        ("flags : amx_bf16", False),
        ("Features : asimd sve", True),
        ("Features : asimd bf16 sve", False),
        ("isa : rv64imafdc", False),  # no flags
        (None, False),  # not Linux: nothing is known
    ],
)
def test_bfloat16_that_the_processor_has_no_instructions_for_is_said(
    cpu, slow, tmp_path, monkeypatch, caplog
) -> None:
    if cpu:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{cpu}\n")
    monkeypatch.setattr("lavis_aurora.training.rates.CPU_INFO", tmp_path / "cpuinfo")
    for amp, eval_bf16, evaluate, said in (
        ("bf16", False, False, "run.amp: bf16: this"),
        (False, True, False, "run.eval_bf16: true: this"),
        ("bf16", True, False, "run.amp: bf16 and run.eval_bf16: true: this"),
        ("bf16", True, True, "run.eval_bf16: true: this"),  # nothing is trained
        ("bf16", False, True, None),
        (True, False, True, None),
        (False, False, False, None),
    ):
        caplog.clear()
        settings = OmegaConf.create({"run_cfg": {"amp": amp, "eval_bf16": eval_bf16}})
        runner = SimpleNamespace(config=settings, cuda_enabled=False, evaluate_only=evaluate)
        OptimizedRunner.warn_of_precision(runner)
        lines = [record.message for record in caplog.records]
        assert len(lines) == (slow and said is not None) and all(line.startswith(said) for line in lines)
