"""One nested training against trainings of each rank: which runs there are, and the table."""

from __future__ import annotations

import copy
import json

import comparison
import nested
import proximal
import pytest
import torch
from nested import RANKS, CutTest, add_results, area, main, sort_components, table, trained_cells
from tiny import activate, project_yaml, tiny_model

from lavis_aurora.adapters.config import read_adapter
from lavis_aurora.adapters.files import load_adapter, save_adapter, write_adapter
from lavis_aurora.adapters.switching import find_adapters
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.paths import package_file
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.models import RetrievalAuroraConfig
from lavis_aurora.project import load_config
from lavis_aurora.training.runner import AuroraRunner


def test_cells_train_what_their_method_says(tmp_path):
    yaml = str(project_yaml(tmp_path))
    cells = trained_cells(tmp_path, ["growing", "uniform", "naive", "proximal"], [1, 2], 4)
    assert list(cells) == [(m, 64, s) for s in (1, 2) for m in ("growing", "uniform", "proximal", "dedicated")]
    assert len(trained_cells(tmp_path, ["dedicated", "naive", "largest"], [1], 4)) == len(RANKS)
    for (method, rank, seed), cell in cells.items():
        cfg = load_config(yaml, [f"{key}={value}" for key, value in cell.settings.items()])
        settings = parse_config(RetrievalAuroraConfig, cfg.model_cfg, "model").mode_approx
        assert (settings.rank, cfg.run_cfg.seed) == (rank, seed)
        assert settings.nested == (method in nested.NESTED)
        assert cfg.run_cfg.max_epoch == (1 if method == "dedicated" else 6)
        assert cfg.run_cfg.rank == ("auto" if settings.nested else None)
        if settings.nested:
            assert (settings.nested_ranks, settings.nested_steps) == ([4, 8, 16, 32], method)


def test_the_area_is_the_mean_over_the_logarithm_of_the_rank():
    assert area({4: 70.0, 8: 70.0, 64: 70.0}) == 70
    assert area({4: 60.0, 8: 80.0, 16: 80.0}) == (70 + 80) / 2
    assert area({4: 60.0, 16: 80.0, 32: 80.0}) == pytest.approx((2 * 70 + 80) / 3)


def test_the_table_has_mean_and_spread(tmp_path):
    found = {"growing": {seed: dict.fromkeys(map(str, RANKS), value) for seed, value in (("1", 80.0), ("2", 82.0))}}
    assert table(found, {"growing": 61.7}).splitlines()[2] == "| growing" + " | 81.0 (1.4)" * 6 + " | 62 |"


def test_results_are_added_to_those_of_earlier_calls(tmp_path):
    path = tmp_path / "nested.json"
    add_results(path, {"growing": {2: {4: 70.0}}, "naive": {2: {4: 10.0}}}, {"growing": 3.0, "naive": 2.0}, {"a": 4})
    known = add_results(path, {"growing": {1: {4: 60.0}, 2: {4: 71.0}}}, {"growing": 5.0}, {"b": 8})
    assert known == json.loads(path.read_text())
    assert known["recall"] == {"growing": {"1": {"4": 60.0}, "2": {"4": 71.0}}, "naive": {"2": {"4": 10.0}}}
    assert list(known["recall"]["growing"]) == ["1", "2"]
    assert (known["seconds"], known["auto"]) == ({"growing": 5.0, "naive": 2.0}, {"a": 4, "b": 8})


def adapted_factors(**settings):
    """A model of rank 6 with all linear layers whose update is not zero, its factors and slots."""
    approx = {"rank": 6, "targets": "all_linear", **settings}
    model = activate(tiny_model(mode_approx=approx))
    sets = find_adapters(model)
    return model, sets["default"], sets.slots


def test_a_component_is_as_large_as_its_part_of_all_updates():
    model, factors, slots = adapted_factors()
    plain = torch.zeros(6)
    for r in range(6):
        part = copy.deepcopy(factors)
        with torch.no_grad():
            part.coefficients[:, [k for k in range(6) if k != r]] = 0
        for k, (d_in, d_out) in enumerate(slots.values()):
            plain[r] += part.delta_weight([k], d_in, d_out).detach().square().sum()
    torch.testing.assert_close(proximal.component_sizes(factors, slots).detach(), plain.sqrt())


def test_a_proximal_step_shortens_all_components_alike_and_small_ones_to_zero():
    _, factors, slots = adapted_factors()
    with torch.no_grad():
        factors.coefficients[:, 2] *= 1e-3
    before = proximal.component_sizes(factors, slots).detach()
    by = 2 * before.min().item()
    proximal.shorten(factors, slots, by)
    after = proximal.component_sizes(factors, slots)
    torch.testing.assert_close(after, (before - by).clamp(min=0))
    assert after[2] == 0 and (after > 0).sum() == 5


@pytest.mark.parametrize("sharing", ["global", "tower"])
def test_sorted_components_give_the_same_update(sharing, tmp_path):
    model, factors, slots = adapted_factors(sharing=sharing)
    save_adapter(model, tmp_path / "given")
    config, tensors = read_adapter(tmp_path / "given")
    write_adapter(tmp_path / "sorted", config, sort_components(config, tensors))
    load_adapter(model, tmp_path / "sorted", "sorted")
    of_sorted = find_adapters(model)["sorted"]
    for k, (d_in, d_out) in enumerate(slots.values()):
        torch.testing.assert_close(of_sorted.delta_weight([k], d_in, d_out), factors.delta_weight([k], d_in, d_out))
    sizes = proximal.component_sizes(of_sorted, slots)
    assert torch.equal(sizes, sizes.sort(descending=True).values)


def proximal_optimizer(monkeypatch, model):
    """That of a penalised run of the model, at a rate of 0.1."""
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setattr(AuroraRunner, "optimizer", property(lambda self: made))
    runner = object.__new__(proximal.ProximalRunner)
    runner._optimizer, runner._model = None, model
    return runner.optimizer


def test_each_step_of_the_optimizer_shortens_by_its_rate(monkeypatch):
    model, factors, slots = adapted_factors()
    monkeypatch.setattr(proximal.ProximalRunner, "penalty", 0.5)
    optimizer = proximal_optimizer(monkeypatch, model)
    before = proximal.component_sizes(factors, slots).detach()
    optimizer.load_state_dict(optimizer.state_dict())  # as where a run goes on
    optimizer.step()  # without a gradient nothing else moves
    optimizer.step()
    torch.testing.assert_close(proximal.component_sizes(factors, slots).detach(), (before - 0.1).clamp(min=0))


@pytest.mark.parametrize(
    "settings",
    [{"tuning": "full"}, {"mode_approx": {"form": "core"}}, {"mode_approx": {"nested": True, "nested_ranks": [2]}}],
)
def test_what_has_no_components_to_shorten_is_refused(settings, monkeypatch):
    with pytest.raises(AuroraError, match="mode_approx.form cp, not nested"):
        proximal_optimizer(monkeypatch, tiny_model(**settings))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cfg-path", "x", "--options", "run.seed=2", "--penalty", "3"],
        ["--penalty", "3", "--options", "run.seed=2", "--cfg-path", "x"],
        ["--cfg-path=x", "--options=run.seed=2", "--penalty=3"],
    ],
)
def test_options_of_a_penalised_run_are_kept_in_any_order(arguments, monkeypatch):
    given = []
    monkeypatch.setattr(proximal, "train", given.append)
    monkeypatch.setattr(proximal.ProximalRunner, "penalty", None)
    proximal.main(arguments)
    assert given == [["--cfg-path", "x", "--options", "run.seed=2", "run.runner=runner_proximal"]]
    assert proximal.ProximalRunner.penalty == 3
    for wrong in ("-1", "nan", "inf", "much"):
        with pytest.raises(SystemExit):
            proximal.main(["--cfg-path", "x", "--penalty", wrong])


@pytest.mark.slow
def test_a_whole_comparison(tmp_path, monkeypatch, capsys):
    """Trains three runs, of which one is cut twice, and tests what is cut; the second call only prints."""
    weights = package_file("configs/models/tiny/model.safetensors")
    yaml = project_yaml(tmp_path, model={"pretrained": weights})
    monkeypatch.setitem(comparison.TASKS, "pictures", str(yaml))
    monkeypatch.setattr(nested, "RANKS", (2, 8))
    arguments = ["--seeds", "1", "--methods", "growing", "naive", "largest", "proximal"]
    arguments += ["--output", str(tmp_path / "out"), "--jobs", "2"]
    main(arguments)
    first = capsys.readouterr().out
    assert "| growing |" in first and "| naive |" in first and "run.rank: auto chose" in first
    content = json.loads((tmp_path / "out" / "nested.json").read_text())
    assert content["recall"].keys() == {"growing", "naive", "largest", "proximal"}
    assert content["recall"]["growing"]["1"].keys() == {"2", "8"}
    assert content["auto"]["growing, seed 1"] in (2, 8)
    monkeypatch.setattr(CutTest, "start", None)
    main(arguments)
    assert capsys.readouterr().out.splitlines()[-7:] == first.splitlines()[-7:]
    made = {str(path.parent.relative_to(tmp_path / "out")) for path in (tmp_path / "out").glob("*/*/adapter")}
    assert made == {"growing_8_seed1/rank_2", *(f"dedicated_8_seed1/{one}_2" for one in ("rank", "largest"))} | {
        "proximal_8_seed1/largest_2"
    }
