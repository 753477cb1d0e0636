"""BLIP as transformers has it: written, loaded by transformers alone, and read back."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from lavis.common.registry import registry
from lavis.models import load_preprocess
from lavis_models import build, hub_folder
from omegaconf import OmegaConf
from PIL import Image
from tiny import activate, tiny_config, tiny_model
from tiny_vqa import QUESTIONS, vqa_model

from lavis_aurora import AuroraError, ModeApproxConfig, load_model_and_preprocess, merged_state_dict, save_adapter
from lavis_aurora.common.paths import package_file
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.models.blip_vqa_aurora import BlipVqaAurora
from lavis_aurora.models.hugging_face import NAMES, export_transformers, from_hugging_face, to_hugging_face
from lavis_aurora.models.mode_approx_model import ModeApproxModel
from lavis_aurora_cli import main

GATELESS = {"gate": {"form": "none"}, "mode_approx": {"rank": 4}}
TEXTS = ["a red circle", "a big blue square and a small star"]


def picture(seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (60, 80, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def loaded(folder: Path) -> tuple[transformers.PreTrainedModel, transformers.BlipProcessor]:
    """By transformers alone, every weight of it in the folder."""
    [name] = transformers.BlipConfig.from_pretrained(str(folder)).architectures
    cls = getattr(transformers, name)
    model, info = cls.from_pretrained(str(folder), output_loading_info=True)
    assert not any(info.values()), info
    return model.eval(), transformers.BlipProcessor.from_pretrained(str(folder))


def usage(folder: Path) -> dict:
    """What the code in the model card leaves, run as it stands there."""
    card = (folder / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert str(folder.parent) not in card
    scope = {"image": picture()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        exec(code, scope)
    return scope


@torch.no_grad()
def check_retrieval(model, folder: Path, size: int, atol: float = 1e-5) -> None:
    exported, processor = loaded(folder)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    expected = model.match(images, TEXTS)
    text = processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    itc = exported(pixel_values=images, **text, use_itm_head=False)[0]
    torch.testing.assert_close(itc, expected.itc, rtol=0, atol=atol)
    text["input_ids"][:, 0] = processor.tokenizer.convert_tokens_to_ids("[ENC]")
    for image, logits in zip(images, expected.itm_logits):
        found = exported(pixel_values=image.expand(len(TEXTS), -1, -1, -1), **text).itm_score
        torch.testing.assert_close(found, logits, rtol=0, atol=atol)


def test_every_weight_has_one_name_there_and_comes_back():
    for name, model in (("BlipForImageTextRetrieval", tiny_model()), ("BlipForQuestionAnswering", vqa_model())):
        state = {k: v for k, v in model.state_dict().items() if "_m." not in k and "mode_approx" not in k}
        state = {k: v for k, v in state.items() if "queue" not in k and ".gate." not in k}
        named = to_hugging_face(state, scale=2.0)
        assert len(named) == len(state) and not any("visual_encoder" in key for key in named)
        back = from_hugging_face(named, model.state_dict(), scale=2.0)
        assert back.keys() == state.keys()
        for key in state:
            torch.testing.assert_close(back[key], state[key], rtol=0, atol=0)
        assert hasattr(transformers, name)
    assert len(set(NAMES.values())) == len(NAMES)


@pytest.mark.parametrize("trained", [True, False])
def test_retrieval_scores_as_here(tmp_path, trained):
    """With the trained weights of type tiny an epsilon of 1e-5 in place of 1e-6 would change scores by 2e-4."""
    pretrained = {"pretrained": tiny_config().tokenizer + "/model.safetensors"} if trained else {}
    model = activate(tiny_model(**GATELESS, **pretrained), std=0.05).eval()
    assert export_transformers(model, tmp_path / "out") == "BlipForImageTextRetrieval"
    check_retrieval(model, tmp_path / "out", 48)
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in (tmp_path / "out").iterdir())
    assert not any(b"site-packages" in file.read_bytes() for file in (tmp_path / "out").iterdir())


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_questions_are_answered_as_here(tmp_path, beams):
    model = activate(vqa_model(**GATELESS), std=0.05).eval()
    assert export_transformers(model, tmp_path / "out") == "BlipForQuestionAnswering"
    exported, processor = loaded(tmp_path / "out")
    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    answers = []
    for image, question in zip(images.unsqueeze(1), QUESTIONS):
        samples = {"image": image, "text_input": [question]}
        given = processor(text=question, return_tensors="pt")
        states = model.forward_encoder(dict(samples))[0].last_hidden_state
        vision = exported.vision_model(pixel_values=image).last_hidden_state
        found = exported.text_encoder(**given, encoder_hidden_states=vision).last_hidden_state
        torch.testing.assert_close(found, states, rtol=1e-5, atol=1e-5)
        ids = torch.tensor([[model.tokenizer.bos_token_id, 5, 6, 7]])
        mask = torch.ones(states.shape[:-1], dtype=torch.long)
        logits = [one.text_decoder(ids, encoder_hidden_states=states, encoder_attention_mask=mask).logits
                  for one in (model, exported)]  # fmt: skip
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
        answers += model.predict_answers(samples, inference_method="generate", num_beams=beams, max_len=8)
        if beams == 1:
            tokens = exported.generate(pixel_values=image, **given, max_length=8)
        else:  # 4.26 expands no states for beams
            tokens = exported.text_decoder.generate(
                torch.full((1, 1), exported.decoder_start_token_id),
                encoder_hidden_states=found.repeat_interleave(beams, 0),
                encoder_attention_mask=torch.ones(beams, found.shape[1]),
                num_beams=beams,
                max_length=8,
                min_length=1,
                eos_token_id=exported.config.text_config.sep_token_id,
                pad_token_id=exported.config.text_config.pad_token_id,
            )
        # Random models say tokens that no vocabulary has, which fast tokenizers pass over.
        assert model.tokenizer.decode(tokens[0], skip_special_tokens=True) == answers[-1]
        known = [token for token in tokens[0].tolist() if token < len(processor.tokenizer)]
        words = [one.decode(known, skip_special_tokens=True) for one in (processor, model.tokenizer)]
        assert words[0] == words[1]
    assert len(set(answers)) > 1


@pytest.fixture
def lavis_folder(tmp_path, monkeypatch):
    """LAVIS's own constructors find their tokenizer there."""
    monkeypatch.chdir(hub_folder(tmp_path / "hub"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["blip_retrieval", "blip_image_text_matching", "blip_vqa", "blip_caption"])
def test_models_of_lavis_itself(tmp_path, lavis_folder, name):
    """Towers of two widths, and LAVIS's own code on both sides."""
    plain = build(name)
    model = activate(ModeApproxModel(copy.deepcopy(plain), ModeApproxConfig(rank=4, targets=name)), std=0.1).eval()
    if name == "blip_vqa":  # 24 and 32 wide, where transformers has one width for both cross-attentions
        with pytest.raises(AuroraError, match="BlipForQuestionAnswering of transformers has weights that the model"):
            export_transformers(model, tmp_path / "out")
        return
    export_transformers(model, tmp_path / "out")
    exported, processor = loaded(tmp_path / "out")
    plain.load_state_dict(merged_state_dict(model))
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    if name == "blip_caption":
        expected = plain.generate({"image": images}, num_beams=1, max_length=9, min_length=1)
        given = processor(text="a ", return_tensors="pt")
        tokens = exported.generate(images, **given, max_length=9, min_length=1)
        assert [processor.decode(tokens[0], skip_special_tokens=True)[len(plain.prompt) :]] == expected
        ids = torch.tensor([[plain.tokenizer.bos_token_id, 9, 8]])
        vision = exported.vision_model(images).last_hidden_state
        logits = exported.text_decoder(ids, encoder_hidden_states=vision).logits
        mask = torch.ones(vision.shape[:-1], dtype=torch.long)
        vision = plain.visual_encoder.forward_features(images)
        other = plain.text_decoder(ids, encoder_hidden_states=vision, encoder_attention_mask=mask).logits
        torch.testing.assert_close(logits, other, rtol=1e-5, atol=1e-5)
        return
    given = processor(text=TEXTS[:1], return_tensors="pt")
    cls = registry.get_model_class("blip_image_text_matching")
    scorer = cls(plain.visual_encoder, plain.text_encoder, embed_dim=16).eval()
    scorer.load_state_dict({key: value for key, value in plain.state_dict().items() if key in scorer.state_dict()})
    samples = {"image": images, "text_input": TEXTS[:1]}
    itc = exported(pixel_values=images, **given, use_itm_head=False)[0]
    torch.testing.assert_close(itc, scorer(samples, match_head="itc"), rtol=0, atol=1e-5)
    given["input_ids"][:, 0] = processor.tokenizer.convert_tokens_to_ids("[ENC]")
    itm = exported(pixel_values=images, **given).itm_score
    torch.testing.assert_close(itm, scorer(samples, match_head="itm"), rtol=0, atol=1e-5)


def test_the_processor_makes_lavis_pictures_and_tokens(tmp_path):
    model = activate(tiny_model(**GATELESS)).eval()
    export_transformers(model, tmp_path / "out")
    processor = loaded(tmp_path / "out")[1]
    vis, _ = load_preprocess(OmegaConf.load(BlipRetrievalAurora.default_config_path("tiny")).preprocess)
    found = processor(images=[picture(1), picture(2).convert("RGBA")], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, torch.stack([vis["eval"](picture(i)) for i in (1, 2)]), rtol=0, atol=1e-5)
    long = " ".join(TEXTS * 9)
    tokens = processor(text=[*TEXTS, long], padding=True, truncation=True, return_tensors="pt")
    assert torch.equal(tokens["input_ids"], model.tokenize([*TEXTS, long], pad_to_longest=True).input_ids)


@pytest.mark.parametrize("again", [False, True])
def test_what_was_exported_loads_as_a_backbone(tmp_path, again):
    """Also written anew by transformers, which keeps what it does not know in config.json."""
    model = activate(tiny_model(**GATELESS), std=0.05).eval()
    export_transformers(model, tmp_path / "out")
    folder = tmp_path / "out"
    if again:
        folder = tmp_path / "again"
        loaded(tmp_path / "out")[0].save_pretrained(str(folder))
    state = merged_state_dict(model)
    for path in (folder, next(folder.glob("*model.*"))):
        other = tiny_model(seed=5, pretrained=str(path)).state_dict()
        for key in state:
            if "queue" not in key and "_m." not in key and key != "temp":
                torch.testing.assert_close(other[key], state[key], rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["BlipForImageTextRetrieval", "BlipForQuestionAnswering"])
def test_weights_of_the_hub_load_as_they_are(tmp_path, name, caplog):
    """Of transformers' own making: what LAVIS has no name for here would be missing or left over."""
    model = activate((tiny_model if "Retrieval" in name else vqa_model)(**GATELESS)).eval()
    export_transformers(model, tmp_path / "out")
    config = transformers.BlipConfig.from_pretrained(str(tmp_path / "out"))
    del config.vision_config.residual_scale
    torch.manual_seed(4)
    hub = getattr(transformers, name)(config)
    if "Question" in name:  # the hub's are alike, as in BLIP, where these are one
        decoder = hub.text_decoder
        hub.save_pretrained(str(tmp_path / "apart"))
        with pytest.raises(AuroraError, match="differ, which are one weight in LAVIS"):
            vqa_model(pretrained=str(tmp_path / "apart"))
        decoder.cls.predictions.decoder.weight.data.copy_(decoder.bert.embeddings.word_embeddings.weight)
    hub.save_pretrained(str(tmp_path / "hub"))
    with caplog.at_level("INFO"):
        cls = BlipRetrievalAurora if "Retrieval" in name else BlipVqaAurora
        defaults = OmegaConf.load(cls.default_config_path("tiny")).model
        tuned = cls.from_config(OmegaConf.merge(defaults, {"pretrained": str(tmp_path / "hub")}))
    assert "has Hugging Face's names, and no temp" in caplog.text
    state = to_hugging_face({k: v for k, v in tuned.state_dict().items() if "_m." not in k})
    for key, value in hub.state_dict().items():
        assert torch.equal(state[key], value), key


def test_weights_of_another_kind_are_refused_with_what_to_take(tmp_path):
    activate(model := vqa_model(**GATELESS))
    export_transformers(model, tmp_path / "out")
    with pytest.raises(AuroraError, match="lacks .* weights of the model: itm_head.* take one of BLIP of this kind"):
        tiny_model(pretrained=str(tmp_path / "out"))


def test_a_scale_that_is_no_number_is_refused(tmp_path):
    export_transformers(activate(tiny_model(**GATELESS)), tmp_path / "out")
    loaded(tmp_path / "out")[0].save_pretrained(str(tmp_path / "again"))
    path = tmp_path / "again" / "config.json"
    path.write_text(re.sub(r'"residual_scale": [\d.]+', '"residual_scale": "x"', path.read_text()))
    with pytest.raises(AuroraError, match="residual_scale 'x' cannot be used"):
        tiny_model(pretrained=str(tmp_path / "again"))


def test_what_transformers_does_not_have_is_refused(tmp_path, lavis_folder):
    with pytest.raises(AuroraError, match="the gates cannot be folded into weights"):
        export_transformers(tiny_model(), tmp_path / "out")
    albef = ModeApproxModel(build("albef_vqa"), ModeApproxConfig(rank=2, targets="albef_vqa"))
    with pytest.raises(AuroraError, match="transformers has no class for AlbefVQA; it has those of LAVIS's blip_ret"):
        export_transformers(albef, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The command


@pytest.fixture
def adapter(tmp_path):
    """A tuned tiny model on the weights of its type."""
    model, _, _ = load_model_and_preprocess("blip_retrieval_aurora", "tiny", is_eval=True)
    settings = OmegaConf.merge(OmegaConf.load(BlipRetrievalAurora.default_config_path("tiny")).model, GATELESS)
    model = activate(BlipRetrievalAurora.from_config(settings), std=0.05).eval()
    save_adapter(model, tmp_path / "adapter", metrics={"epoch": 2, "val": {"text_to_image_r1": 41.234}})
    return model, tmp_path / "adapter"


def test_the_command_writes_a_model_whose_card_can_be_run(adapter, tmp_path, capsys):
    model, folder = adapter
    split = {"dataset": "flickr30k", "split": "train", "trained": True, "samples": 145000, "images": 29000}
    (tmp_path / "data.json").write_text(json.dumps({"format": 1, "splits": [split]}))
    main(["export", str(folder), str(tmp_path / "out"), "--to", "transformers"])
    said, card = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    assert "BlipForImageTextRetrieval.from_pretrained" in said
    for words in ("library_name: transformers", "| base | blip_retrieval_aurora/tiny (sha256 ", "rank 4, scale 8.0",
                  "text_to_image_r1 41.23", "lower case",
                  "| flickr30k, train | trained on: 145,000 samples, 29,000 images |"):  # fmt: skip
        assert words in card
    scope = usage(tmp_path / "out")
    _, vis, _ = load_model_and_preprocess("blip_retrieval_aurora", "tiny")
    expected = model.match(vis["eval"](picture()).unsqueeze(0), ["a red circle"])
    torch.testing.assert_close(scope["itc"], expected.itc, rtol=0, atol=1e-5)
    torch.testing.assert_close(scope["itm"], expected.itm[0], rtol=0, atol=1e-5)


def test_the_command_writes_a_lora_whose_card_can_be_run(adapter, tmp_path, capsys):
    pytest.importorskip("peft")
    model, folder = adapter
    main(["export", str(folder), str(tmp_path / "out"), "--to", "peft"])
    assert "LoRA of rank 4 in 21 layers.\nWith the heads that were trained: vision_proj" in capsys.readouterr().out
    tuned = usage(tmp_path / "out")["model"]
    images = torch.randn(2, 3, 48, 48)
    expected, found = model.match(images, TEXTS), tuned.match(images, TEXTS)
    torch.testing.assert_close(found.itm_logits, expected.itm_logits, rtol=0, atol=1e-5)
    main(["export", str(folder), str(tmp_path / "cut"), "--to", "peft", "--rank", "2"])
    assert "Cut to this rank: || dW - B A || / || dW || = 0." in capsys.readouterr().out


def test_what_the_other_program_must_be_told_is_said(tmp_path, capsys, caplog):
    """Settings and sources that are not the type's, and what neither of the libraries can do."""
    weights = tmp_path / "own.safetensors"
    weights.write_bytes(Path(package_file("configs/models/tiny/model.safetensors")).read_bytes())
    model = activate(tiny_model(pretrained=str(weights), token_merging=2, max_txt_len=20, **GATELESS))
    save_adapter(model, tmp_path / "adapter")
    sources = ["--pretrained", str(weights)]
    said = {}
    for to in ("peft", "transformers"):
        main(["export", str(tmp_path / "adapter"), str(tmp_path / f"it's {to}"), "--to", to, *sources])
        said[to] = capsys.readouterr().out
        assert f'from_pretrained({"backbone, " * (to == "peft")}"{tmp_path}/it\'s {to}")' in said[to]
    assert "load_model_and_preprocess('blip_retrieval_aurora', 'tiny', pretrained=..., is_eval=True)" in said["peft"]
    assert "not that of the type: name the pretrained that it was tuned with." in said["peft"]
    assert "is to be built as it was tuned, by a YAML or in Python: max_txt_len 20, token_merging 2." in said["peft"]
    # To whoever exports once, by the log; to whoever is given the folder, by its card.
    card = (tmp_path / "it's transformers" / "README.md").read_text()
    assert "tuned with token_merging 2; with all tokens, as here, scores differ" in card
    main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged.pth"), *sources])
    assert "token_merging" not in said["transformers"] + capsys.readouterr().out
    assert caplog.text.count("token_merging is 2 here; a plain model keeps all tokens") == 2


def test_the_home_folder_is_the_shells(adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    main(["merge", str(adapter[1]), "~/merged.pth"])
    main(["export", str(adapter[1]), "~/lora", "--to", "peft"])
    assert (tmp_path / "merged.pth").is_file() and (tmp_path / "lora" / "README.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "onyx"], "--to: unknown format 'onyx'"),
        (["--to", "transformers", "--rank", "2"], "--rank: is of peft's LoRA"),
        (["--to", "peft", "--rank", "0"], "rank: 0 cannot be used; it must be 1 or more"),
    ],
)
def test_the_command_refuses_in_one_line(adapter, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit):
        main(["export", str(adapter[1]), str(tmp_path / "out"), *arguments])
    [line] = capsys.readouterr().err.splitlines()
    assert words in line and not (tmp_path / "out").exists()


# BLIP base


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["blip_retrieval_aurora", "blip_vqa_aurora"])
def test_blip_base(tmp_path, arch):
    """All of its shapes, with random weights and any vocabulary."""
    cls = registry.get_model_class(arch)
    small = {"pretrained": None, "load_finetuned": False, "tokenizer": package_file("configs/models/tiny")}
    queue = {"queue_size": 0} if "retrieval" in arch else {}
    cfg = OmegaConf.merge(OmegaConf.load(cls.default_config_path("base")).model, GATELESS, small, queue)
    model = activate(cls.from_config(cfg), std=0.05).eval()
    export_transformers(model, tmp_path / "out")
    if "retrieval" in arch:
        check_retrieval(model, tmp_path / "out", cfg.image_size)
        return
    exported, processor = loaded(tmp_path / "out")
    image = torch.randn(1, 3, cfg.image_size, cfg.image_size)
    with torch.no_grad():
        states = model.forward_encoder({"image": image, "text_input": QUESTIONS[:1]})[0].last_hidden_state
        vision = exported.vision_model(pixel_values=image).last_hidden_state
        given = processor(text=QUESTIONS[0], return_tensors="pt")
        found = exported.text_encoder(**given, encoder_hidden_states=vision).last_hidden_state
        torch.testing.assert_close(found, states, rtol=1e-5, atol=1e-5)
        tokens = exported.generate(pixel_values=image, **given, max_length=6)
    asked = {"image": image, "text_input": QUESTIONS[:1]}
    [answer] = model.predict_answers(asked, inference_method="generate", num_beams=1, max_len=6)
    assert model.tokenizer.decode(tokens[0], skip_special_tokens=True) == answer
