"""Adapters of the BLIP models: folders, gates and heads, and plain LAVIS after merging (laws 3 and 6)."""

import copy
import json
from pathlib import Path

import pytest
import torch
from distributed import run_programs
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from lavis.models.blip_models.blip_vqa import BlipVQA
from lavis.models.med import XBertLMHeadDecoder
from omegaconf import OmegaConf
from tiny import activate, lavis_towers, project_yaml, tiny_config, tiny_model
from tiny_vqa import ANSWERS, vqa_batch, vqa_config, vqa_model
from torch.utils.data import DataLoader, Dataset

from lavis_aurora import (
    AuroraError,
    disable_adapter,
    list_adapters,
    load_adapter,
    load_model_and_preprocess,
    merged_state_dict,
    save_adapter,
    set_adapter,
)
from lavis_aurora.common.paths import package_file
from lavis_aurora.encoders.towers import build_tokenizer, encode_visual
from lavis_aurora_cli import evaluate, main, train

ROOT = Path(__file__).resolve().parents[2]
TINY_WEIGHTS = package_file("configs/models/tiny/model.safetensors")
CAPTIONS = ["a red circle", "a big blue square and a small star", "a ring", "a small pink heart"]


class Pairs(Dataset):
    """Pictures and texts as LAVIS's retrieval evaluation takes them."""

    def __init__(self) -> None:
        self.image = torch.randn(len(CAPTIONS), 3, 48, 48, generator=torch.Generator().manual_seed(0))
        self.text = CAPTIONS

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, i: int) -> dict:
        return {"image": self.image[i], "index": i}


def scores(model) -> tuple:
    """LAVIS's two matrices, image-to-text and text-to-image."""
    with torch.no_grad():
        task = OmegaConf.create({"k_test": len(CAPTIONS)})
        return model.eval().compute_sim_matrix(DataLoader(Pairs(), batch_size=2), task)


def assert_same_scores(a: tuple, b: tuple) -> None:
    for mine, theirs in zip(a, b):
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), atol=1e-4, rtol=1e-4)


def plain_retrieval(**overrides) -> BlipRetrieval:
    """LAVIS's blip_retrieval of the tiny size, with random weights."""
    cfg = tiny_config(**overrides)

    class Plain(BlipRetrieval):
        @classmethod
        def init_tokenizer(cls):
            return build_tokenizer(cfg.tokenizer)

    return Plain(*lavis_towers(cfg), queue_size=cfg.get("queue_size", 57600), embed_dim=cfg.embed_dim)


def plain_vqa() -> BlipVQA:
    """LAVIS's blip_vqa of the tiny size, with random weights."""
    cfg = vqa_config()

    class Plain(BlipVQA):
        @classmethod
        def init_tokenizer(cls):
            return build_tokenizer(cfg.tokenizer)

    return Plain(*lavis_towers(cfg), XBertLMHeadDecoder.from_config(cfg))


def randomized(model):
    """Every part of the adapter, and every head, at values of its own."""
    activate(model, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for head in model.heads:
            for p in [head] if isinstance(head, torch.nn.Parameter) else head.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


# The walk


def test_from_tuning_to_plain_lavis(tmp_path, monkeypatch):
    """Tune, load the folder in a fresh process, merge, load into LAVIS's own model: the scores stay the same."""
    monkeypatch.chdir(tmp_path)
    model = {"pretrained": TINY_WEIGHTS, "gate": {"form": "none"}}
    yaml = project_yaml(tmp_path, model=model, run={"max_epoch": 2, "init_lr": 1e-2})
    train(["--cfg-path", str(yaml)])
    [run] = (tmp_path / "output").iterdir()
    tested = json.loads((run / "result" / "test_epoch_best.json").read_text())
    for kind in ("best", "last"):
        assert json.loads((run / f"adapter_{kind}" / "adapter_config.json").read_text())["metrics"]["val"]

    folder = run / "adapter_best"
    options = [f"model.adapter={folder}", f"run.output_dir={tmp_path / 'again'}"]
    run_programs(1, evaluate, ["--cfg-path", str(yaml), "--options", *options])
    [again] = (tmp_path / "again").iterdir()
    repeated = json.loads((again / "result" / "test_epoch_0.json").read_text())
    assert repeated["ranks"] == tested["ranks"] and repeated["metrics"] == tested["metrics"]
    metrics = json.loads((folder / "adapter_config.json").read_text())["metrics"]["test"]
    assert metrics["image_to_text_r1"] == tested["metrics"]["image_to_text_r1"]

    loaded, vis, _ = load_model_and_preprocess("blip_retrieval_aurora", adapter=folder, is_eval=True)
    untuned, _, _ = load_model_and_preprocess("blip_retrieval_aurora", "tiny", is_eval=True)
    expected = scores(loaded)
    assert abs(expected[0] - scores(untuned)[0]).max() > 1e-2
    assert vis["eval"] is not None
    main(["merge", str(folder), "merged.pth"])
    plain = plain_retrieval(queue_size=512)  # the type's; the run's is not the adapter's
    plain.load_state_dict(torch.load("merged.pth", weights_only=True)["model"], strict=True)
    assert_same_scores(scores(plain), expected)


# Merging


def test_merged_retrieval_scores_as_in_plain_lavis_teacher_and_all():
    model = randomized(tiny_model(gate={"form": "none"}, queue_size=8))
    plain = plain_retrieval(queue_size=8)
    plain.load_state_dict(merged_state_dict(model), strict=True)
    assert_same_scores(scores(plain), scores(model))
    image = Pairs().image
    text = model.tokenize(CAPTIONS)
    plain.eval()
    with torch.no_grad():
        embeds = model.text_encoder.forward_text(text).last_hidden_state
        image_m, text_m, _, _ = model._teacher(image, text, encode_visual(model.visual_encoder, image), embeds)
        torch.testing.assert_close(plain.visual_encoder_m.forward_features(image), image_m, atol=1e-4, rtol=1e-4)
        own = plain.text_encoder_m.forward_text(text).last_hidden_state
        torch.testing.assert_close(own, text_m, atol=1e-4, rtol=1e-4)
    assert (image_m - plain.visual_encoder.forward_features(image)).abs().max() > 1e-2


def test_of_an_adapter_beside_default_the_merged_teacher_is_itself(tmp_path):
    save_adapter(randomized(tiny_model(gate={"form": "none"}, queue_size=8)), tmp_path)
    model = randomized(tiny_model(gate={"form": "none"}, queue_size=8))
    load_adapter(model, tmp_path, "other")
    set_adapter(model, "other")
    plain = plain_retrieval(queue_size=8)
    plain.load_state_dict(merged_state_dict(model), strict=True)
    for own, twin in plain.model_pairs:
        assert all(torch.equal(p, q) for p, q in zip(own.parameters(), twin.parameters()))


def test_merged_question_answering_answers_as_in_plain_lavis():
    model = activate(vqa_model(gate={"form": "none"}), seed=3).eval()
    plain = plain_vqa().eval()
    plain.load_state_dict(merged_state_dict(model), strict=True)
    samples = vqa_batch()
    with torch.no_grad():
        torch.testing.assert_close(plain(dict(samples))["loss"], model(dict(samples))["loss"])
    rank = {"inference_method": "rank", "answer_list": ANSWERS, "num_ans_candidates": 4}
    assert plain.predict_answers(dict(samples), **rank) == model.predict_answers(dict(samples), **rank)


@pytest.mark.parametrize("form", ["residual", "convex", "affine"])
def test_gates_cannot_be_merged_into_a_plain_checkpoint(form):
    with pytest.raises(AuroraError, match="gates cannot be folded.*model.gate.form: none.*or keep the adapter"):
        merged_state_dict(tiny_model(gate={"form": form}))


# Several adapters


def test_a_folder_brings_factors_gates_and_heads_to_a_model_of_another_rank(tmp_path):
    tuned = randomized(tiny_model(mode_approx={"rank": 5}))
    save_adapter(tuned, tmp_path)
    model = randomized(tiny_model(mode_approx={"rank": 3}))
    own = scores(model)
    load_adapter(model, tmp_path, "tuned")
    assert_same_scores(scores(model), own)
    set_adapter(model, "tuned")
    assert_same_scores(scores(model), scores(tuned))
    assert list_adapters(model) == ["default", "tuned"]
    set_adapter(model, "default")
    assert all((a == b).all() for a, b in zip(scores(model), own))


@pytest.mark.parametrize("make", [tiny_model, vqa_model])
def test_an_adapter_beside_the_trained_one_is_not_trained(tmp_path, make):
    model = make()
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path, "other")
    model.train()
    model.check_trained()
    set_adapter(model, "other")
    with pytest.raises(AuroraError, match="the adapter 'other' is frozen.* without a name to train it further"):
        model({})
    with torch.no_grad():
        model.check_trained()
    model.eval().check_trained()
    for parameter in model.train().mode_approx.sets["other"].parameters():
        parameter.requires_grad_(True)  # by hand
    model.check_trained()


@pytest.mark.parametrize("form", ["residual", "convex", "affine"])
def test_disabled_is_the_pretrained_model_heads_and_all(form):
    base = tiny_model(tuning="frozen")
    model = randomized(tiny_model(gate={"form": form}))
    assert abs(scores(model)[0] - scores(base)[0]).max() > 1e-2
    with disable_adapter(model):
        assert_same_scores(scores(model), scores(base))


def test_an_adapter_without_heads_uses_the_backbones(tmp_path):
    bare = activate(tiny_model(train_heads=False), seed=3)
    save_adapter(bare, tmp_path)
    model = randomized(tiny_model())
    load_adapter(model, tmp_path, "bare")
    set_adapter(model, "bare")
    assert_same_scores(scores(model), scores(bare))


def test_the_teacher_starts_as_the_adapter_that_is_loaded(tmp_path):
    tuned = randomized(tiny_model())
    save_adapter(tuned, tmp_path)
    model = tiny_model()
    load_adapter(model, tmp_path)
    sets = model.mode_approx.sets
    assert torch.equal(sets["momentum"].P, sets["default"].P)
    assert torch.equal(sets["default"].P, tuned.mode_approx.sets["default"].P)
    assert torch.equal(model.vision_proj_m.weight, tuned.vision_proj.weight)
    assert all(p.requires_grad for p in sets["default"].parameters())


# Settings


def test_what_the_folder_says_of_the_model(tmp_path):
    save_adapter(tiny_model(mode_approx={"rank": 6}, queue_size=8), tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["model"]["arch"], said["model"]["model_type"]) == ("blip_retrieval_aurora", "tiny")
    assert said["mode_approx"]["rank"] == said["model"]["settings"]["mode_approx"]["rank"] == 6
    assert not {"queue_size", "alpha"} & said["model"]["settings"].keys()
    assert said["model"]["preprocess"]["vis_processor"]["eval"]["image_size"] == 48
    assert said["base"]["name"] is None and len(said["base"]["sha256"]) == 64


MISFITS = [
    ({"gate": {"form": "convex"}}, "gate.form is 'residual' there and 'convex' here; set model.gate.form to it"),
    ({"gate": {"form": "none"}}, "gate.form is 'residual' there and 'none' here"),
    ({"mode_approx": {"rank": 2}}, "mode_approx.rank is 64 there and 2 here"),
    ({"vit": {"patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 4}}, "27 slots there and 24 here"),
]


@pytest.mark.parametrize(("overrides", "words"), MISFITS)
def test_misfits(tmp_path, overrides, words):
    save_adapter(tiny_model(), tmp_path)
    with pytest.raises(AuroraError, match=words):
        load_adapter(tiny_model(**overrides), tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    save_adapter(vqa_model(mode_approx={"rank": 64}), tmp_path)
    with pytest.raises(AuroraError, match="it is of 'blip_vqa_aurora', and this is blip_retrieval_aurora"):
        load_adapter(tiny_model(), tmp_path)
    with pytest.raises(AuroraError, match="is an adapter of 'blip_vqa_aurora', not of blip_retrieval_aurora"):
        load_model_and_preprocess("blip_retrieval_aurora", adapter=tmp_path)


def test_the_base_does_not_depend_on_picture_size_or_queue(tmp_path):
    """Zero-shot use: tuned at one size, used at another."""
    model = tiny_model(pretrained=TINY_WEIGHTS)
    save_adapter(model, tmp_path)
    load_adapter(tiny_model(pretrained=TINY_WEIGHTS, image_size=32, queue_size=4), tmp_path)
    with pytest.raises(AuroraError, match=r"tuned on other weights \(blip_retrieval_aurora/tiny, sha256"):
        load_adapter(tiny_model(), tmp_path)
    load_adapter(tiny_model(adapter=str(tmp_path), adapter_check_base=False), tmp_path, check_base=False)


def test_the_key_needs_a_tuning_with_adapters():
    with pytest.raises(AuroraError, match="needs model.tuning: aurora or lora or uniadapter, not heads"):
        tiny_model(adapter="somewhere", tuning="heads")


def test_question_answering_folder(tmp_path):
    model = activate(vqa_model(mode_approx={"rank": 4}, share_decoder=False), seed=5).eval()
    save_adapter(model, tmp_path)
    with pytest.raises(AuroraError, match="slots there and"):
        load_adapter(vqa_model(mode_approx={"rank": 4}), tmp_path)
    fresh = vqa_model(mode_approx={"rank": 4}, share_decoder=False).eval()
    load_adapter(fresh, tmp_path)
    samples = vqa_batch()
    with torch.no_grad():
        assert torch.equal(fresh(dict(samples))["loss"], model(dict(samples))["loss"])
    said = json.loads((tmp_path / "adapter_config.json").read_text())["model"]["settings"]
    assert said["share_decoder"] is False


def test_copies_have_adapters_of_their_own():
    model = randomized(tiny_model())
    other = copy.deepcopy(model)
    with disable_adapter(other):
        assert other.mode_approx.active is None and model.mode_approx.active == "default"
        assert not torch.equal(other.vision_proj.weight, model.vision_proj.weight)
    with torch.no_grad():
        other.mode_approx.sets["default"].P.zero_()
    assert model.mode_approx.sets["default"].P.abs().sum() > 0
