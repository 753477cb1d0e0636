"""Laws of the retrieval model, against LAVIS's own blip_retrieval."""

import copy

import pytest
import torch
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from tiny import activate, keys_of_trained, tiny_config, tiny_model
from tiny_retrieval import CAPTIONS, batch, train_steps

from lavis_aurora import AuroraError
from lavis_aurora.config.check import parse_config
from lavis_aurora.config.models import RetrievalAuroraConfig
from lavis_aurora.encoders import fused
from lavis_aurora.encoders.towers import build_text_encoder, build_tokenizer, build_vision_encoder
from lavis_aurora.mode_approx.layers import ModeApproxLinear


def lavis_twin(model, **overrides) -> BlipRetrieval:
    """LAVIS's model with the same weights."""
    cfg = parse_config(RetrievalAuroraConfig, tiny_config(**overrides), "model")

    class Plain(BlipRetrieval):
        @classmethod
        def init_tokenizer(cls):
            return build_tokenizer(cfg.tokenizer)

    vision = build_vision_encoder(cfg)
    text = build_text_encoder(cfg, vision.vision_width)
    twin = Plain(vision, text, queue_size=cfg.queue_size, embed_dim=cfg.embed_dim, alpha=cfg.alpha)
    keys = twin.load_state_dict(model.state_dict(), strict=False)
    adapter = ("mode_approx.", "text_encoder.encoder.layer.")
    assert all(key.startswith(adapter) for key in keys.unexpected_keys)
    assert all(key.startswith(("visual_encoder_m.", "text_encoder_m.")) for key in keys.missing_keys)
    twin.copy_params()
    return twin.eval()


@pytest.mark.parametrize("tuning", ["aurora", "aurora, all_linear", "heads", "full", "frozen"])
def test_losses_at_step_0_are_lavis(tuning):
    """Law 1: with the same weights and seed, over several batches that fill the queue."""
    tuning, _, targets = tuning.partition(", ")
    overrides = {"queue_size": 20, "context": {"form": "none"}, "tuning": tuning}
    overrides["mode_approx"] = {"targets": targets or None}
    model = tiny_model(**overrides).eval()
    twin = lavis_twin(model, **overrides)
    for step in range(4):
        samples = batch(step=step, ids=[0, 1, 2, 2, 4])
        with torch.no_grad():
            ours = model(dict(samples))
            torch.manual_seed(model._negative_seed + step)
            theirs = twin(dict(samples))
        for key in ("loss_itc", "loss_itm", "loss"):
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.image_queue, twin.image_queue)
        torch.testing.assert_close(model.idx_queue, twin.idx_queue)


def test_step_0_with_gradients_and_momentum_is_lavis():
    """Law 1 for the heads' gradients, and for the teacher after an update of the heads."""
    overrides = {"queue_size": 20, "context": {"form": "none"}, "tuning": "heads", "momentum": 0.5}
    model = tiny_model(**overrides).eval()
    twin = lavis_twin(model, **overrides)
    twin.momentum = 0.5
    for step in range(3):
        for one in (model, twin):
            torch.manual_seed(model._negative_seed + step if model._negative_seed is not None else 0)
            one.zero_grad()
            one(batch(step=step))["loss_itc"].backward()
        for a, b in ((model.vision_proj, twin.vision_proj), (model.text_proj, twin.text_proj)):
            torch.testing.assert_close(a.weight.grad, b.weight.grad)
            with torch.no_grad():
                a.weight -= 0.1 * a.weight.grad
                b.weight -= 0.1 * b.weight.grad
        torch.testing.assert_close(model.vision_proj_m.weight, twin.vision_proj_m.weight)


def test_gradients_of_the_whole_model_are_lavis():
    """Law 1, every gradient: shared keys and values, the fused kernel and matching's order change none."""
    overrides = {"queue_size": 20, "tuning": "full", "alpha": 0.4}
    model = tiny_model(**overrides).eval()
    twin = lavis_twin(model, **overrides)
    samples = {**batch(ids=[0, 1, 2, 2, 4]), "epoch": 1}
    model(dict(samples))["loss"].backward()
    # The noise of the negatives is the model's own; the queue has moved on for both alike.
    torch.manual_seed(model._negative_seed + 10)
    twin(dict(samples))["loss"].backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and theirs[name].grad is not None:
            scale = theirs[name].grad.abs().max().clamp(min=1e-4)
            assert (parameter.grad - theirs[name].grad).abs().max() < 1e-3 * scale, name


@pytest.mark.parametrize(("gate", "targets"), [("residual", None), ("affine", None), ("residual", "all_linear")])
def test_every_path_gives_the_plain_gradients(gate, targets, monkeypatch):
    """Folded or beside, keys once or three times: one loss, one gradient of every factor, gate and head."""
    results = []
    for plain in (True, False):
        if plain:
            monkeypatch.setattr(ModeApproxLinear, "folds", lambda self, x: False)
            monkeypatch.setattr(fused, "attend_in_matching", repeated_keys)
        settings = {"mode_approx": {"targets": targets}, "gate": {"form": gate}}
        model = activate(tiny_model(**settings), std=0.1 if targets else 0.2).train()
        model(batch())["loss"].backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        monkeypatch.undo()
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        assert (results[1][name] - grad).abs().max() < 1e-3 * grad.abs().max().clamp(min=1e-4), name


def test_mixed_precision_is_near_single_precision():
    results = []
    for enabled in (False, True):
        model = activate(tiny_model(context={"form": "none"}), std=0.1).train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model(batch())["loss"]
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
        factors = model.mode_approx.sets["default"].parameters()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in factors])))
    (loss, grad), (near, near_grad) = results
    torch.testing.assert_close(near.float(), loss, atol=0.05, rtol=0)
    assert torch.cosine_similarity(grad, near_grad, dim=0) > 0.98


def repeated_keys(query, key, value, wrong_image, dropout, bias):
    assert bias is None  # no tokens are merged
    index = torch.cat([torch.arange(len(key)), wrong_image, torch.arange(len(key))])
    scores = query @ key[index].transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.softmax(dim=-1) @ value[index]


@pytest.mark.parametrize("tuning", ["aurora", "heads", "full"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_teacher_that_is_the_model_itself_is_not_computed(tuning, momentum):
    model = tiny_model(tuning=tuning, momentum=momentum).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    passes = []
    towers = [model.visual_encoder, getattr(model, "visual_encoder_m", model.visual_encoder)]
    for tower in dict.fromkeys(towers):
        tower.norm.register_forward_hook(lambda *_: passes.append(1))
    output = model(batch())
    once = momentum == 0 or tuning == "heads"
    assert len(passes) == (1 if once else 2)
    same = torch.equal(output.intermediate_output.image_embeds, output.intermediate_output.image_embeds_m)
    assert same == once
    # With dropout the teacher's draw is its own.
    model.visual_encoder.pos_drop.p = 0.5
    model(batch())
    assert len(passes) == (3 if once else 4)


@pytest.mark.parametrize("gate", ["residual", "convex", "affine", "none"])
def test_only_adapter_and_heads_change(gate):
    """Law 4: the backbone is bit-identical after training, and every trained parameter has a gradient."""
    model = tiny_model(gate={"form": gate})
    before = copy.deepcopy(model.state_dict())
    allowed = keys_of_trained(model)
    train_steps(model)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k]) and "queue" not in k}
    assert changed == allowed
    missing = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not missing


def test_full_tuning_can_leave_the_vision_encoder_as_it_is():
    model = tiny_model(tuning="full", freeze_vit=True)
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert "text_encoder" in trained and "visual_encoder" not in trained
    assert not any(name.startswith("visual_encoder") for name in model.run_state())
    with pytest.raises(AuroraError, match="model.freeze_vit: for model.tuning: full, not aurora"):
        tiny_model(freeze_vit=True)


def test_full_tuning_trains_the_backbone_and_has_a_second_one():
    model = tiny_model(tuning="full")
    before = copy.deepcopy(model.state_dict())
    train_steps(model, 2)
    after = model.state_dict()
    for key in ("visual_encoder.blocks.0.attn.qkv.weight", "visual_encoder_m.blocks.0.attn.qkv.weight"):
        assert not torch.equal(after[key], before[key])


def test_teacher_is_a_moving_average_over_the_same_backbone():
    model = tiny_model(momentum=0.75)
    assert not hasattr(model, "visual_encoder_m")
    sets = model.mode_approx.sets
    with torch.no_grad():
        for parameter in sets["default"].parameters():
            parameter.add_(1.0)
    expected = {
        name: 0.75 * teacher + 0.25 * sets["default"].get_parameter(name)
        for name, teacher in sets["momentum"].named_parameters()
    }
    model(batch())
    torch.testing.assert_close(dict(sets["momentum"].named_parameters()), expected)
    assert not any(p.requires_grad for p in sets["momentum"].parameters())
    assert model.mode_approx.active == "default"


def test_train_heads_false_trains_the_adapter_alone():
    model = tiny_model(train_heads=False)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    default = set(map(id, model.mode_approx.sets["default"].parameters()))
    gates = {id(p) for n, p in model.named_parameters() if ".gate." in n}
    assert trained == default | gates


@pytest.mark.parametrize("size", [7, 5])
def test_queue_of_any_size_wraps_around(size):
    model = tiny_model(queue_size=size)
    seen = []
    for step in range(5):
        ids = [10 * step + i for i in range(3)]
        model(batch(3, step, ids))
        seen += ids
        assert int(model.queue_ptr) == len(seen) % size
        filled = min(size, len(seen))
        assert sorted(model.idx_queue[0].tolist())[size - filled :] == sorted(seen[-filled:])
    torch.testing.assert_close(model.image_queue.norm(dim=0), torch.ones(size))


def test_no_queue_and_a_queue_that_is_too_small():
    assert tiny_model(queue_size=0)(batch(2))["loss"].isfinite()
    with pytest.raises(AuroraError, match="model.queue_size: 2 is less than the 5 samples"):
        tiny_model(queue_size=2)(batch())


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (
            {"image": batch()["image"], "text_input": CAPTIONS},
            "samples lack 'image_id', 'epoch', 'iters', 'num_iters_per_epoch'; training needs image (or video), "
            "text_input, image_id, epoch, iters, num_iters_per_epoch; to score pictures and texts use model.match",
        ),
        (
            {k: v for k, v in batch().items() if k != "image"},
            "samples lack 'image'; training needs image (or video),",
        ),
    ],
)
def test_samples_that_cannot_be_trained_on(samples, message):
    with pytest.raises(AuroraError) as caught:
        tiny_model()(samples)
    assert message in str(caught.value)


def test_batches_without_true_negatives_have_no_false_ones():
    model = tiny_model(context={"form": "none"}).eval()
    lone, pair = model(batch(1)), model(batch(3, ids=[4, 4, 4]))
    for output, count in ((lone, 1), (pair, 3)):
        logits = output.intermediate_output.itm_logits[:count]
        expected = torch.nn.functional.cross_entropy(logits, torch.ones(count, dtype=torch.long))
        torch.testing.assert_close(output.loss_itm, expected)


def test_negatives_are_other_images():
    """With two images the negatives are known: each text with the other image and the reverse."""
    model = tiny_model(context={"form": "none"}).eval()
    samples = batch(2)
    logits = model(samples).intermediate_output.itm_logits
    ids = model.tokenize(samples["text_input"])
    ids.input_ids[:, 0] = model.tokenizer.enc_token_id
    image = model.visual_encoder.forward_features(samples["image"])

    def score(i: int, j: int) -> torch.Tensor:
        output = model.text_encoder(
            ids.input_ids[j : j + 1],
            attention_mask=ids.attention_mask[j : j + 1],
            encoder_hidden_states=image[i : i + 1],
            return_dict=True,
        )
        return model.itm_head(output.last_hidden_state[:, 0])[0]

    pairs = [(0, 0), (1, 1), (1, 0), (0, 1), (0, 1), (1, 0)]
    torch.testing.assert_close(logits, torch.stack([score(i, j) for i, j in pairs]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["attention", "mean", "random"])
def test_context_changes_training_and_not_evaluation(form):
    model, plain = tiny_model(context={"form": form}).train(), tiny_model(context={"form": "none"}).train()
    plain.load_state_dict(model.state_dict())
    a, b = model(batch()), plain(batch())
    torch.testing.assert_close(a.loss_itc, b.loss_itc)
    assert (a.loss_itm - b.loss_itm).abs() > 1e-4
    # All pairs, positive and negative, are enhanced alike.
    moved = (a.intermediate_output.itm_logits - b.intermediate_output.itm_logits).abs().sum(dim=1)
    assert (moved > 1e-4).all()


def test_run_state_round_trip_and_its_errors():
    model, fresh = activate(tiny_model()), tiny_model(seed=1)
    state = model.run_state()
    assert not any("queue" in key or key.startswith("visual_encoder") for key in state)
    fresh.load_run_state(state, "x.pth")
    for name, value in fresh.run_state().items():
        assert torch.equal(value, state[name])
    key = "mode_approx.sets.default.P"
    with pytest.raises(AuroraError, match=f"x.pth does not fit this model: {key} is missing"):
        fresh.load_run_state({k: v for k, v in state.items() if k != key}, "x.pth")
    with pytest.raises(AuroraError, match=r"is \(27, 64\) there and \(27, 8\) here"):
        tiny_model(mode_approx={"rank": 8}).load_run_state(state, "x.pth")
    with pytest.raises(AuroraError, match="is not trained here"):
        tiny_model(tuning="heads").load_run_state(state, "x.pth")


@pytest.mark.parametrize("tuning", ["aurora", "full"])
def test_a_video_of_one_frame_is_a_picture(tuning):
    """Losses and gradients, of the whole model with its teacher."""
    results = []
    for kind in ("image", "video"):
        model = activate(tiny_model(tuning=tuning, queue_size=20)).train()
        samples = batch()
        if kind == "video":
            samples["video"] = samples.pop("image").unsqueeze(2)
        torch.manual_seed(0)
        losses = model(samples)
        losses["loss"].backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([losses[key].detach() for key in ("loss_itc", "loss_itm")] + gradients)
    assert len(results[0]) == len(results[1]) > 10
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_more_frames_change_the_losses_and_are_trained_on():
    model = activate(tiny_model(queue_size=20)).train()
    samples = batch()
    image = samples.pop("image")
    losses = []
    for video in (torch.stack([image, image], dim=2), torch.stack([image, image.flip(0)], dim=2)):
        torch.manual_seed(0)
        losses.append(model({**samples, "video": video})["loss"])
    assert (losses[0] - losses[1]).abs() > 1e-3
    losses[1].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
