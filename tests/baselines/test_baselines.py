"""Laws that every baseline keeps: the start, what is trained, counts, saving and loading."""

import copy
import sys

import pytest
import torch
from distributed import run_processes
from tiny import activate, keys_of_trained, tiny_model
from tiny_retrieval import batch, half, model_and_batch, step, train_steps
from tiny_vqa import vqa_batch, vqa_model

from lavis_aurora import AuroraError
from lavis_aurora.baselines.lora import LoraSets
from lavis_aurora.baselines.uniadapter import UniAdapters
from lavis_aurora.config.method import UniAdapterConfig
from lavis_aurora.encoders.fusion import add_bottlenecks
from lavis_aurora.mode_approx.presets import LAYERS

SMALL = {"lora": {"rank": 4, "alpha": 8.0}, "uniadapter": {"rank": 16}, "context": {"form": "none"}}
VQA = {key: SMALL[key] for key in ("lora", "uniadapter")}
baselines = pytest.mark.parametrize("tuning", ["lora", "uniadapter"])


@baselines
def test_the_start_is_the_backbone(tuning):
    """Law 1: with the same weights and seed the losses are those of the model with trained heads alone."""
    plain, tuned = (tiny_model(tuning=one, queue_size=20, **SMALL).eval() for one in ("heads", tuning))
    for i in range(2):
        a, b = plain(batch(step=i)), tuned(batch(step=i))
        for key in ("loss_itc", "loss_itm"):
            torch.testing.assert_close(a[key], b[key])
    plain, tuned = (vqa_model(tuning=one, **VQA).eval() for one in ("frozen", tuning))
    torch.testing.assert_close(plain(vqa_batch())["loss"], tuned(vqa_batch())["loss"])


@baselines
def test_only_the_adapter_its_copy_and_the_heads_change(tuning):
    """Law 4."""
    model = tiny_model(tuning=tuning, **SMALL)
    before = copy.deepcopy(model.state_dict())
    allowed = keys_of_trained(model)
    train_steps(model)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k]) and "queue" not in k}
    assert changed == allowed
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not hasattr(model, "visual_encoder_m")


@baselines
def test_the_teacher_is_a_moving_average_and_the_backbone_can_be_had(tuning):
    model = activate(tiny_model(tuning=tuning, momentum=0.75, **SMALL))
    sets = model.baseline.sets
    pairs = list(zip(sets["default"].parameters(), sets["momentum"].parameters()))
    expected = [0.75 * teacher + 0.25 * online for online, teacher in pairs]
    model.eval()
    output = model(batch())
    for (_, teacher), value in zip(pairs, expected):
        torch.testing.assert_close(teacher, value)
    assert not torch.equal(output.intermediate_output.image_embeds, output.intermediate_output.image_embeds_m)
    image = batch()["image"]
    with model.baseline.use(None):
        plain = model.visual_encoder.forward_features(image)
    torch.testing.assert_close(plain, tiny_model(tuning="frozen").eval().visual_encoder.forward_features(image))
    with model.baseline.use("momentum"):
        teacher = model.visual_encoder.forward_features(image)
    torch.testing.assert_close(teacher, output.intermediate_output.image_embeds_m)


@baselines
def test_saved_and_loaded_into_a_fresh_model(tuning):
    """Law 6."""
    model, fresh = activate(tiny_model(tuning=tuning, **SMALL)), tiny_model(tuning=tuning, **SMALL)
    fresh.load_run_state(model.run_state(), "x.pth")
    for one in (model, fresh):
        one.eval()
    torch.testing.assert_close(model(batch())["loss"], fresh(batch())["loss"])
    with pytest.raises(AuroraError, match="does not fit this model"):
        tiny_model(tuning="heads").load_run_state(model.run_state(), "x.pth")


@baselines
def test_a_checkpoint_of_the_backbone_loads(tuning, tmp_path):
    plain = tiny_model(seed=3, tuning="frozen").eval()
    torch.save({"model": plain.state_dict()}, tmp_path / "blip.pth")
    model = tiny_model(tuning=tuning, pretrained=str(tmp_path / "blip.pth"), **SMALL).eval()
    image = batch()["image"]
    torch.testing.assert_close(
        model.visual_encoder.forward_features(image), plain.visual_encoder.forward_features(image)
    )


@pytest.mark.slow
@baselines
def test_two_processes_compute_what_one_computes(tuning):
    """Law 7."""
    model, samples = model_and_batch(tuning, slice(0, 4))
    losses, grads, _ = step(model, samples, model)
    (first, grads_0, _), (second, _, _) = run_processes(2, half, tuning)
    for name, value in losses.items():
        assert (first[name] + second[name]) / 2 == pytest.approx(value, abs=1e-5)
    assert grads.keys() == grads_0.keys()
    for name, grad in grads.items():
        assert abs(grads_0[name] - grad).max() / max(abs(grad).max(), 1e-3) < 1e-3, name


def test_uniadapter_is_what_its_paper_says():
    model = activate(tiny_model(tuning="uniadapter", **SMALL)).eval()
    one = model.baseline.sets["default"]
    layer = model.text_encoder.encoder.layer[1]
    t, f = torch.randn(2, 3, 128), torch.randn(2, 3, 128)

    def bottleneck(up, x):
        down = torch.relu(x @ one.down[1].weight.t() + one.down[1].bias)
        return 0.1 * (down @ up[1].weight.t() + up[1].bias)

    with model.baseline.use(None):
        plain = layer.feed_forward_chunk(f)
        block = model.visual_encoder.blocks[1].mlp(f)
    torch.testing.assert_close(layer.feed_forward_chunk(f), plain + bottleneck(one.text_up, f))
    layer.crossattention.query = t
    fused = bottleneck(one.text_up, t) + bottleneck(one.text_up, f) + bottleneck(one.fusion_up, f)
    torch.testing.assert_close(layer.feed_forward_chunk(f), plain + fused)
    assert layer.crossattention.query is None
    torch.testing.assert_close(model.visual_encoder.blocks[1].mlp(f), block + bottleneck(one.vision_up, f))


def test_lora_is_the_layer_with_the_updated_weight():
    model = activate(tiny_model(tuning="lora", **SMALL)).eval()
    qkv = model.visual_encoder.blocks[0].attn.qkv
    update = qkv.lora_B["default"].weight @ qkv.lora_A["default"].weight * 8 / 4
    x = torch.randn(2, 128)
    expected = torch.nn.functional.linear(x, qkv.base_layer.weight + update, qkv.base_layer.bias)
    torch.testing.assert_close(qkv(x), expected)


@pytest.mark.parametrize(
    ("settings", "count", "base"),
    [
        # Query, key, value (one layer in the ViT) and the feed-forward layers of both towers: the paper's 10.6M.
        ({"lora": {"rank": 32}}, lambda layers, d, r: 36 * layers * d * r, 10_616_832),
        ({"lora": {"rank": 32, "targets": ["attention"]}}, lambda layers, d, r: 16 * layers * d * r, 4_718_592),
        # 2dr more for each of three output projections.
        ({"lora": {"rank": 32, "targets": "all_linear"}}, lambda layers, d, r: 42 * layers * d * r, 12_386_304),
        # With biases; the Aurora paper has 4.6M and 18.8M.
        ({"uniadapter": {"rank": 128}}, lambda layers, d, r: layers * (4 * d * r + r + 3 * d), 4_747_776),
        ({"uniadapter": {"rank": 512}}, lambda layers, d, r: layers * (4 * d * r + r + 3 * d), 18_908_160),
    ],
)
def test_counts(settings, count, base):
    (tuning, section), *_ = settings.items()
    model = tiny_model(tuning=tuning, train_heads=False, **settings)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count(3, 128, section["rank"])
    assert count(12, 768, section["rank"]) == base


@pytest.mark.parametrize("targets", [*LAYERS, ["attention", "feed_forward"]])
@pytest.mark.parametrize("make", [tiny_model, pytest.param(vqa_model, marks=pytest.mark.slow)])
def test_lora_and_aurora_name_the_same_layers_by_the_same_words(make, targets):
    ours, theirs = (
        make(tuning=tuning, **{key: {"rank": 2, "targets": targets}})
        for tuning, key in (("aurora", "mode_approx"), ("lora", "lora"))
    )
    names = [[name for name, _ in model.adapters.updated_layers(model)] for model in (ours, theirs)]
    assert names[0] == names[1]


def test_lora_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AuroraError, match=r"pip install 'lavis_aurora\[baselines\]'"):
        tiny_model(tuning="lora")


def test_towers_of_two_widths_cannot_share():
    model = tiny_model(tuning="frozen")
    model.visual_encoder.embed_dim = 64
    with pytest.raises(AuroraError, match="3 layers of width 64, 3 layers of width 128"):
        add_bottlenecks(
            model.visual_encoder, [model.text_encoder], lambda depth, dim: UniAdapters(depth, dim, UniAdapterConfig())
        )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"lora": {"targets": []}}, "lora.targets: .* cannot be used"),
        ({"tuning": "lora", "lora": {"targets": "feed_forwad"}}, "did you mean the preset 'feed_forward'"),
        ({"lora": {"rank": 0}}, "lora.rank: 0"),
        ({"uniadapter": {"rank": 0}}, "uniadapter.rank: 0"),
    ],
)
def test_values_that_cannot_be_used(section, message):
    with pytest.raises(AuroraError, match=message):
        tiny_model(**section)


def test_a_vqa_model_with_uniadapter_shares_it_with_the_decoder():
    model = vqa_model(tuning="uniadapter", **VQA)
    encoder, decoder = model.text_encoder.encoder.layer[0], model.text_decoder.bert.encoder.layer[0]
    assert encoder.adapters is decoder.adapters
    model.train()
    model(vqa_batch())["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_lora_sets_are_not_in_the_state_twice():
    model = tiny_model(tuning="lora", **SMALL)
    assert isinstance(model.baseline, LoraSets)
    # The backbone's heads wait there; the matrices are in the layers alone.
    assert all(key.startswith("baseline.companions.") for key in model.state_dict() if key.startswith("baseline."))
    twin = copy.deepcopy(model)
    assert next(iter(twin.baseline.layers.values())) is twin.get_submodule(next(iter(twin.baseline.layers)))
