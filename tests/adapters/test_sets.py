"""Laws that hold for every kind of adapter: folders, switching, disabling, merging."""

import json

import pytest
import torch
from tiny import activate, tiny_config, tiny_model
from tiny_retrieval import batch, train_steps
from tiny_vqa import vqa_batch, vqa_model
from toy import rewrite_adapter

from lavis_aurora import (
    AuroraError,
    delete_adapter,
    disable_adapter,
    list_adapters,
    load_adapter,
    load_model_and_preprocess,
    merge_adapter,
    merged_state_dict,
    save_adapter,
    set_adapter,
    unmerge_adapter,
)
from lavis_aurora.adapters.config import CONFIG, TENSORS, AdapterConfig, read_adapter, read_adapter_config
from lavis_aurora.adapters.sets import KINDS
from lavis_aurora.adapters.switching import adapters_of
from lavis_aurora.common.paths import package_file
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora

SMALL = {"mode_approx": {"rank": 4}, "lora": {"rank": 4, "alpha": 8.0}, "uniadapter": {"rank": 16}, "queue_size": 0}
TUNINGS = ("aurora", "lora", "uniadapter")
WEIGHTS = package_file("configs/models/tiny/model.safetensors")
kinds = pytest.mark.parametrize("tuning", [*TUNINGS, pytest.param("aurora", id="core")])
two_kinds = pytest.mark.parametrize(
    "tuning",
    [
        *("aurora", "lora"),
        pytest.param("uniadapter", marks=pytest.mark.slow),
        pytest.param("aurora", id="core", marks=pytest.mark.slow),
    ],
)


@pytest.fixture(autouse=True)
def form(request, monkeypatch):
    """Of the method, where a test's parameters say so, the released code's form."""
    if "core" in getattr(getattr(request.node, "callspec", None), "id", ""):
        monkeypatch.setitem(SMALL, "mode_approx", {"rank": 4, "form": "core"})


def tuned(tuning, seed=0, **changes):
    """A model whose adapter and heads are not those of the start."""
    model = activate(tiny_model(tuning=tuning, **{**SMALL, **changes}), seed=seed + 1)
    with torch.no_grad():
        for head in (model.vision_proj, model.itm_head):
            head.weight.add_(0.1 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


def outputs(model):
    """Logits of matching, and features of images."""
    with torch.no_grad():
        scores = model.eval().match(batch()["image"], batch()["text_input"])
        return torch.cat([scores.itm_logits.flatten(), scores.itc.flatten()])


def assert_same(found, expected, message=None):
    """Of two models: what they compute is rounded as their tensors lie in memory."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=message)


def test_every_kind_is_here():
    assert {cls.tuning for cls in KINDS.values()} == set(TUNINGS)
    assert all(adapters_of(tiny_model(tuning=one, **SMALL)).kind == kind for kind, one in zip(KINDS, TUNINGS))


@kinds
def test_saved_and_loaded_into_a_fresh_model(tuning, tmp_path):
    model = tuned(tuning)
    save_adapter(model, tmp_path, metrics={"epoch": 1})
    fresh = tiny_model(tuning=tuning, **SMALL)
    assert not torch.allclose(outputs(fresh), outputs(model))
    trained = {name for name, p in fresh.named_parameters() if p.requires_grad}
    load_adapter(fresh, tmp_path)
    assert_same(outputs(fresh), outputs(model))
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == trained
    for online, teacher in zip(*(adapters_of(fresh)[name].parameters() for name in ("default", "momentum"))):
        assert torch.equal(online, teacher)


@kinds
def test_an_adapter_beside_another_switches_and_goes(tuning, tmp_path):
    other, model = tuned(tuning, seed=5), tuned(tuning)
    save_adapter(other, tmp_path)
    own, trained = outputs(model), [name for name, p in model.named_parameters() if p.requires_grad]
    load_adapter(model, tmp_path, "other")
    assert list_adapters(model) == ["default", "other"]
    assert torch.equal(outputs(model), own)
    set_adapter(model, "other")
    assert_same(outputs(model), outputs(other))
    with pytest.raises(AuroraError, match="'other' is frozen"):
        model.train()(batch())
    set_adapter(model.eval(), "default")
    assert torch.equal(outputs(model), own)
    delete_adapter(model, "other")
    assert list_adapters(model) == ["default"] and not [name for name in model.state_dict() if "other" in name]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    train_steps(model, steps=1)


@kinds
def test_disabled_is_the_backbone_with_its_heads(tuning):
    model, plain = tuned(tuning), tiny_model(tuning="frozen", queue_size=0)
    before = outputs(model)
    with disable_adapter(model):
        torch.testing.assert_close(outputs(model), outputs(plain))
    assert torch.equal(outputs(model), before)


@kinds
def test_a_loss_without_the_trained_adapter_has_no_teacher(tuning, tmp_path):
    """The momentum copies follow ``default``: inside, they would be compared with and moved to other heads."""
    model = tuned(tuning)
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path, "other")
    copies = [p for _, copy in model.model_pairs for p in copy.parameters()]
    before = [p.clone() for p in copies]
    with disable_adapter(model), pytest.raises(AuroraError, match="no adapter is active, .*leave disable_adapter"):
        model(batch())
    set_adapter(model, "other")
    with torch.no_grad(), pytest.raises(AuroraError, match="'other' is active, .*set_adapter"):
        model(batch())
    assert all(map(torch.equal, copies, before))


@kinds
def test_an_adapter_of_another_kind_is_refused(tuning, tmp_path):
    save_adapter(tuned(tuning), tmp_path)
    for one in TUNINGS:
        model = tiny_model(tuning=one, **SMALL)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        if one != tuning:
            with pytest.raises(AuroraError, match=f"build it with model.tuning: {tuning}"):
                load_adapter(model, tmp_path)
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@two_kinds
def test_the_folder_builds_the_model_and_its_yaml(tuning, tmp_path):
    model = tuned(tuning, pretrained=WEIGHTS, alpha=0.25)
    save_adapter(model, tmp_path)
    for how in ("loaded", "configured"):
        if how == "loaded":
            other, _, _ = load_model_and_preprocess("blip_retrieval_aurora", adapter=tmp_path)
        else:
            other = BlipRetrievalAurora.from_config(
                tiny_config(tuning=tuning, pretrained=WEIGHTS, adapter=str(tmp_path), **SMALL)
            )
        assert other.settings.tuning == tuning
        assert_same(outputs(other), outputs(model), how)


@two_kinds
def test_another_backbone_and_other_sizes_are_refused(tuning, tmp_path):
    save_adapter(tuned(tuning), tmp_path)
    with pytest.raises(AuroraError, match="tuned on other weights"):
        load_adapter(tiny_model(seed=3, tuning=tuning, **SMALL), tmp_path)
    section = adapters_of(tuned(tuning)).kind
    wide = tiny_model(tuning=tuning, **{**SMALL, section: {**SMALL[section], "rank": 6}})
    with pytest.raises(AuroraError, match=f"{section}.rank is (4|16) there and 6 here"):
        load_adapter(wide, tmp_path)
    load_adapter(wide, tmp_path, "narrow")
    set_adapter(wide, "narrow")
    assert_same(outputs(wide), outputs(tuned(tuning)))


@kinds
def test_what_a_stranger_changed_is_refused(tuning, tmp_path):
    save_adapter(tuned(tuning), tmp_path)
    kind = read_adapter_config(tmp_path).kind
    _, tensors = read_adapter(tmp_path)
    prefix = f"{KINDS[kind].prefix}."
    name = next(name for name in tensors if name.startswith(prefix))
    for changed, message in (
        ({**tensors, name: tensors[name][None]}, "does not fit"),
        ({**tensors, f"{prefix}x": tensors[name].clone()}, "is of no slot"),
        ({key: value for key, value in tensors.items() if key != name}, "is missing"),
    ):
        rewrite_adapter(tmp_path, changed)
        with pytest.raises(AuroraError, match=message):
            read_adapter(tmp_path)
    rewrite_adapter(tmp_path, {**tensors, name: torch.full_like(tensors[name], torch.nan)})
    with pytest.raises(AuroraError, match="not finite there"):
        load_adapter(tiny_model(tuning=tuning, **SMALL), tmp_path)
    for settings, message in (({"rank": 2**20}, "rank"), ({"rnk": 4}, "unknown key"), ({"rank": "4"}, "not a int")):
        rewrite_adapter(tmp_path, tensors, **{kind: settings})
        with pytest.raises(AuroraError, match=f"{CONFIG}: {kind}.*{message}"):
            read_adapter(tmp_path)
    save_adapter(tuned(tuning), tmp_path)
    (tmp_path / TENSORS).write_bytes((tmp_path / TENSORS).read_bytes()[:-1] + b"x")
    with pytest.raises(AuroraError, match="or one of them was changed|not a readable"):
        read_adapter(tmp_path)


def test_a_folder_is_of_one_known_kind(tmp_path):
    save_adapter(tuned("lora"), tmp_path)
    data = json.loads((tmp_path / CONFIG).read_text())
    rewrite_adapter(tmp_path, mode_approx={"rank": 4})
    with pytest.raises(AuroraError, match="unknown key"):
        read_adapter(tmp_path)
    data["loha"] = data.pop("lora")
    text = json.dumps(data)
    with pytest.raises(AuroraError, match="of a known kind of adapter; known: mode_approx, lora, uniadapter"):
        AdapterConfig.from_json(text)


@pytest.mark.parametrize("targets", [None, "all_linear"])
@pytest.mark.parametrize("tuning", ["aurora", "lora", pytest.param("aurora", id="core")])
def test_merged_is_unmerged_and_a_plain_checkpoint(tuning, targets):
    section = {"aurora": "mode_approx", "lora": "lora"}[tuning]
    settings = {**SMALL[section], **({"targets": targets} if targets else {})}
    model = tuned(tuning, gate={"form": "none"}, **{section: settings})
    before, state = outputs(model), {name: value.clone() for name, value in model.state_dict().items()}
    plain = tiny_model(tuning="full", queue_size=0)
    missing, unexpected = plain.load_state_dict(merged_state_dict(model), strict=False)
    assert not missing and not unexpected
    # Processors round the core's larger update differently; without it all is elsewhere.
    near = {"atol": 2e-4, "rtol": 1e-3} if settings.get("form") == "core" else {"atol": 3e-5, "rtol": 1e-4}
    torch.testing.assert_close(outputs(plain), before, **near)
    with disable_adapter(model):
        assert (outputs(model) - before).abs().max() > 0.02
    merge_adapter(model)
    torch.testing.assert_close(outputs(model), before, **near)
    # While merged, state dicts hold the backbone's own weights.
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for forbidden in (lambda: model.train()(batch()), lambda: disable_adapter(model).__enter__()):
        with pytest.raises(AuroraError, match="merged"):
            forbidden()
    unmerge_adapter(model.eval())
    assert torch.equal(outputs(model), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_all_linear_layers_are_built_from_the_folder_with_readable_slots(tmp_path):
    settings = {"rank": 4, "targets": "all_linear"}
    model = tuned("aurora", pretrained=WEIGHTS, mode_approx=settings)
    save_adapter(model, tmp_path)
    slots = read_adapter_config(tmp_path).slots
    assert slots.keys() >= {
        "visual_encoder.blocks.0.attn.qkv.query",
        "visual_encoder.blocks.0.attn.proj",
        "visual_encoder.blocks.0.mlp.fc1.block0",
        "visual_encoder.blocks.2.mlp.fc2.block3",
        "text_encoder.encoder.layer.0.crossattention.output.dense",
        "text_encoder.encoder.layer.2.output.dense.block3",
    }
    assert len(slots) == 3 * 28 and all(shape == [128, 128] for shape in slots.values())
    loaded, _, _ = load_model_and_preprocess("blip_retrieval_aurora", adapter=str(tmp_path))
    assert torch.equal(outputs(loaded), outputs(model))
    with pytest.raises(AuroraError, match="84 slots there and 27 here .*; slot visual_encoder.blocks.0.attn.proj"):
        load_adapter(tuned("aurora", pretrained=WEIGHTS), tmp_path)


def test_bottlenecks_cannot_be_merged():
    for merge in (merge_adapter, merged_state_dict):
        with pytest.raises(AuroraError, match="tuning: uniadapter is no update of weights and cannot be merged"):
            merge(tuned("uniadapter"))


@kinds
def test_question_answering_has_them_too(tuning, tmp_path):
    settings = {key: value for key, value in SMALL.items() if key != "queue_size"}
    model, fresh = (vqa_model(tuning=tuning, **settings) for _ in range(2))
    save_adapter(activate(model).eval(), tmp_path)
    load_adapter(fresh.eval(), tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh(vqa_batch())["loss"], model(vqa_batch())["loss"])
