"""Adapters under what torch does to models: checkpointing, autocast, DDP, copies, pickles, compilation."""

import copy
import pickle

import pytest
import torch
from distributed import run_processes
from tiny import activate, med_config, tiny_model
from tiny_vqa import vqa_batch, vqa_model
from torch.nn.parallel import DistributedDataParallel

from lavis_aurora import disable_adapter, load_adapter, merge_adapter, save_adapter, set_adapter, unmerge_adapter
from lavis_aurora.adapters.companions import adapter_parameters

CAPTIONS = ["a red circle", "a big blue square and a small star", "a ring", "a small pink heart"]


def samples(rows: slice = slice(0, 4)) -> dict:
    image = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(5))
    return {
        "image": image[rows],
        "text_input": CAPTIONS[rows],
        "image_id": torch.arange(4)[rows],
        "epoch": 1,
        "iters": 3,
        "num_iters_per_epoch": 10,
    }


def model_of(**overrides):
    torch.manual_seed(0)
    return activate(tiny_model(queue_size=8, alpha=0.4, **overrides)).train()


def gradients(model, context=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and adapter gradients of one step."""
    with context or torch.enable_grad():
        loss = model(samples())["loss"]
    loss.backward()
    names = {id(p): name for name, p in model.named_parameters()}
    return loss.detach(), {names[id(p)]: p.grad for _, p in adapter_parameters(model) if p.requires_grad}


def assert_same(a: tuple, b: tuple, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a[0], b[0], atol=tolerance, rtol=tolerance)
    assert a[1].keys() == b[1].keys() and a[1]
    for name, grad in a[1].items():
        assert (grad - b[1][name]).norm() <= tolerance * max(grad.norm(), 1e-3), name


def features(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().visual_encoder.forward_features(samples()["image"])


@pytest.mark.parametrize("targets", [None, "all_linear"])
def test_gradient_checkpointing_changes_nothing(targets):
    method = {"mode_approx": {"rank": 8, "targets": targets}}
    assert_same(gradients(model_of(**method)), gradients(model_of(**method, vit_grad_ckpt=True, vit_ckpt_layer=3)))


def test_autocast_is_near_single_precision():
    plain = gradients(model_of())
    cast = gradients(model_of(), torch.autocast("cpu", torch.bfloat16))
    assert all(grad.dtype == torch.float32 for grad in cast[1].values())
    assert abs(plain[0] - cast[0]) < 0.05 * plain[0]
    for name, grad in plain[1].items():
        similarity = torch.nn.functional.cosine_similarity(grad.flatten(), cast[1][name].flatten(), dim=0)
        assert similarity > 0.9, name


def test_autocast_with_checkpointing_computes_the_same_twice():
    context = torch.autocast("cpu", torch.bfloat16)
    with_it = gradients(model_of(vit_grad_ckpt=True, vit_ckpt_layer=3), torch.autocast("cpu", torch.bfloat16))
    assert_same(gradients(model_of(), context), with_it, tolerance=0.05)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_whole_models(how, tmp_path):
    model = model_of()
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path, "other")
    other = how(model)
    assert_same(gradients(model), gradients(other))
    set_adapter(other, "other")
    merge_adapter(other)
    assert model.mode_approx.active == "default" and model.mode_approx.merged is None
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}
    assert not shared
    unmerge_adapter(other)
    torch.testing.assert_close(features(other), features(model))


def test_a_pickle_of_question_answering_answers_alike():
    model = activate(vqa_model(), seed=1).eval()
    other = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(other(vqa_batch())["loss"], model(vqa_batch())["loss"])


def shallow(folder) -> dict:
    """One layer in each tower: compilation takes its time by layers."""
    vit = {"patch_size": 16, "embed_dim": 128, "depth": 1, "num_heads": 4}
    return {"vit": vit, "med_config_path": med_config(folder, num_hidden_layers=1)}


@pytest.mark.slow
def test_a_compiled_tower_follows_the_switches(tmp_path):
    """Compiled once: what is active, disabled or merged is seen all the same."""
    model = model_of(**shallow(tmp_path)).eval()
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path, "other")
    with torch.no_grad():
        model.mode_approx.sets["other"].P.mul_(-1)
    tower = torch.compile(model.visual_encoder.forward_features, backend="eager")

    def check() -> torch.Tensor:
        with torch.no_grad():
            compiled = tower(samples()["image"])
        torch.testing.assert_close(compiled, features(model))
        return compiled

    default = check()
    set_adapter(model, "other")
    assert (check() - default).abs().max() > 1e-2
    with disable_adapter(model):
        assert (check() - default).abs().max() > 1e-2
    set_adapter(model, "default")
    torch.testing.assert_close(check(), default)
    merge_adapter(model)
    torch.testing.assert_close(check(), default, atol=1e-4, rtol=1e-4)
    unmerge_adapter(model)
    torch.testing.assert_close(check(), default)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_compiled_model_trains_as_the_plain_one(backend, tmp_path):
    plain = gradients(model_of(**shallow(tmp_path)))
    model = model_of(**shallow(tmp_path))
    model.visual_encoder.forward_features = torch.compile(model.visual_encoder.forward_features, backend=backend)
    model.text_encoder.forward = torch.compile(model.text_encoder.forward, backend=backend)
    assert_same(plain, gradients(model))


def step_beside_another_adapter(rank: int, folder: str) -> dict:
    """Train ``default`` under DDP while another adapter with heads waits beside it."""
    model = model_of()
    load_adapter(model, folder, "other")
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    wrapped(samples(slice(rank, None, 2)))["loss"].backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_ddp_with_a_second_adapter(tmp_path):
    save_adapter(model_of(), tmp_path)
    one = model_of()
    one(samples())["loss"].backward()
    expected = {name: p.grad.numpy() for name, p in one.named_parameters() if p.grad is not None}
    for grads in run_processes(2, step_beside_another_adapter, str(tmp_path)):
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            assert abs(grads[name] - grad).max() <= 1e-3 * max(abs(grad).max(), 1e-3), name
