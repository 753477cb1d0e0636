"""An adapter written for peft, read by peft itself: the same outputs as here."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import activate, tiny_config, tiny_model
from tiny_retrieval import batch
from tiny_vqa import ANSWERS, vqa_batch, vqa_model
from torch import nn
from toy import Toy, adapted_toy, inputs
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel

from lavis_aurora import AuroraError, ModeApproxConfig, inject_mode_approx, merged_state_dict
from lavis_aurora.adapters.export import export_lora
from lavis_aurora.models.blip_retrieval_aurora import BlipRetrievalAurora
from lavis_aurora.models.mode_approx_model import ModeApproxModel

peft = pytest.importorskip("peft")
GATELESS = {"gate": {"form": "none"}, "mode_approx": {"rank": 4}}


def loaded(backbone: nn.Module, folder) -> nn.Module:
    return peft.PeftModel.from_pretrained(backbone, str(folder)).eval()


def plain_toy() -> Toy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy().eval()


def test_each_layer_is_a_lora_of_the_adapters_own_rank(tmp_path):
    """Also a fused layer: dW is compared with the sum of outer products, slot by slot."""
    model = adapted_toy(rank=4).double()
    written = export_lora(model, tmp_path / "lora")
    assert (written.rank, written.error, written.layers) == (4, 0.0, ["qkv", "query", "key"])
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    factors = model.mode_approx.sets["default"]
    for layer, width, out, slots in (("qkv", 8, 8, (0, 1, 2)), ("query", 24, 6, (3,)), ("key", 6, 6, (4,))):
        a, b = (tensors[f"base_model.model.{layer}.lora_{kind}.weight"] for kind in "AB")
        assert a.shape == (4, width) and b.shape == (out * len(slots), 4)
        rows = []
        for k in slots:
            u, v = factors.U[str(width)], factors.V[str(out)]
            rows.append(torch.zeros(out, width))
            for r in range(4):
                weight = factors.scale(width) * factors.coefficients[k, r] * factors.P[k, r]
                rows[-1] += weight.detach() * torch.outer(v[:, r], u[:, r]).detach()
        torch.testing.assert_close(b @ a, torch.cat(rows))


@pytest.mark.parametrize("count", [1, 200])
def test_peft_gives_the_same_outputs(tmp_path, count):
    model = adapted_toy()
    export_lora(model, tmp_path / "lora")
    plain = plain_toy()
    before = plain(inputs(count))
    tuned = loaded(plain, tmp_path / "lora")
    torch.testing.assert_close(tuned(inputs(count)), model(inputs(count)), rtol=1e-6, atol=1e-6)
    assert (before - model(inputs(count))).abs().max() > 0.05
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(merged.qkv.weight, merged_state_dict(model)["qkv.weight"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tuning", ["aurora", "lora"])
def test_retrieval_with_its_trained_heads(tmp_path, tuning):
    """Around this package's frozen model, and its towers in LAVIS's names."""
    lora = {"lora": {"rank": 3, "alpha": 7.0}}
    changes = {**GATELESS, **({} if tuning == "aurora" else {**lora, "context": {"form": "none"}})}
    model = activate(tiny_model(tuning=tuning, **changes)).eval()
    with torch.no_grad():
        for head in (model.vision_proj, model.text_proj, model.itm_head):
            head.weight.add_(0.1 * torch.randn_like(head.weight))
    written = export_lora(model, tmp_path / "lora")
    assert written.heads == ["vision_proj", "text_proj", "itm_head"] and written.left_out == ["temp"]
    frozen = BlipRetrievalAurora.from_config(tiny_config(tuning="frozen"))
    frozen.load_state_dict(tiny_model(tuning="frozen").state_dict())
    tuned = loaded(frozen, tmp_path / "lora")
    images, texts = batch()["image"].double(), batch()["text_input"]
    expected, found, plain = (
        one.double().match(images, texts) for one in (model, tuned, tiny_model(tuning="frozen"))
    )
    torch.testing.assert_close(found.itc, expected.itc, rtol=1e-6, atol=1e-6)
    # What is written is in single precision: on another processor 1.8e-6 were seen.
    torch.testing.assert_close(found.itm_logits, expected.itm_logits, rtol=1e-6, atol=5e-6)
    assert (plain.itm_logits - expected.itm_logits).abs().max() > 0.05


@pytest.mark.parametrize("targets", [None, "all_linear"])
@pytest.mark.parametrize("share", [True, False])
def test_question_answering_whose_decoder_shares_slots(tmp_path, share, targets):
    method = {"rank": 4, "targets": targets}
    model = activate(vqa_model(gate={"form": "none"}, mode_approx=method, share_decoder=share)).eval()
    written = export_lora(model, tmp_path / "lora")
    assert any(layer.startswith("text_decoder.") for layer in written.layers)
    tuned = loaded(vqa_model(tuning="frozen"), tmp_path / "lora")
    torch.testing.assert_close(tuned(vqa_batch())["loss"], model(vqa_batch())["loss"], rtol=1e-6, atol=1e-6)
    asked = {"answer_list": ANSWERS, "return_scores": True}
    expected, found = (one.predict_answers(vqa_batch(), **asked) for one in (model, tuned))
    assert found[0] == expected[0]
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(expected[1]), rtol=1e-5, atol=1e-6)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
OUTSIDE = {
    "bert": lambda: BertModel(BertConfig(vocab_size=50, **SIZES)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **SIZES)),
}


@pytest.mark.parametrize("word", ["attention", "all_linear"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_models_of_other_libraries(tmp_path, name, word):
    """all_linear has slots in blocks, in rows and in columns."""
    torch.manual_seed(0)
    plain = OUTSIDE[name]().eval()
    model = copy.deepcopy(plain)
    inject_mode_approx(model, ModeApproxConfig(rank=4, targets=word))
    activate(model)
    export_lora(model, tmp_path / "lora")
    tuned = loaded(copy.deepcopy(plain), tmp_path / "lora")
    given = torch.arange(12).view(2, 6) if name == "bert" else torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        outputs = [one(given).last_hidden_state for one in (plain, model, tuned)]
    assert (outputs[0] - outputs[1]).abs().max() > 0.01
    torch.testing.assert_close(outputs[2], outputs[1], rtol=1e-5, atol=2e-6)


def test_a_wrapped_model_is_exported_under_the_names_of_the_model_inside(tmp_path):
    base = tiny_model(tuning="full", queue_size=0)
    model = ModeApproxModel(copy.deepcopy(base), ModeApproxConfig(rank=4, targets="blip_retrieval"), ["itm_head"])
    activate(model).eval()
    with torch.no_grad():
        model.base.itm_head.weight.add_(0.3)
    written = export_lora(model, tmp_path / "lora")
    assert written.heads == ["itm_head"] and not any(layer.startswith("base.") for layer in written.layers)
    assert not any("_m." in layer for layer in written.layers), "momentum copies are no part of a backbone"
    tuned = loaded(base.eval(), tmp_path / "lora")
    expected, found = (one.match(batch()["image"], batch()["text_input"]) for one in (model, tuned))
    torch.testing.assert_close(found.itm_logits, expected.itm_logits, rtol=1e-6, atol=2e-6)


def test_a_rank_keeps_the_largest_singular_values_and_tells_the_error(tmp_path):
    model = adapted_toy(rank=4)
    written = export_lora(model, tmp_path / "cut", rank=2)
    tensors = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    lost = whole = 0.0
    for layer in ("qkv", "query", "key"):
        delta = model.get_submodule(layer).delta_weight().detach()
        left, singular, right = torch.linalg.svd(delta)
        best = left[:, :2] @ torch.diag(singular[:2]) @ right[:2]
        a, b = (tensors[f"base_model.model.{layer}.lora_{kind}.weight"] for kind in "AB")
        torch.testing.assert_close(b @ a, best, rtol=1e-5, atol=1e-6)
        lost, whole = lost + (delta - best).square().sum(), whole + delta.square().sum()
    assert written.rank == 2 and written.error == pytest.approx(float((lost / whole).sqrt()), rel=1e-4)
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["r"] == 2


class Nested(nn.Module):
    """Two layers of which the one's name ends with the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(6, 6)
        self.upper = nn.ModuleDict({"key": nn.Linear(6, 6)})

    def forward(self, x):
        return self.upper["key"](torch.tanh(self.key(x)))


def test_a_name_that_ends_another_does_not_name_that_too(tmp_path):
    torch.manual_seed(0)
    plain = Nested()
    model = copy.deepcopy(plain)
    inject_mode_approx(model, ModeApproxConfig(rank=2), ["key"])
    activate(model)
    export_lora(model, tmp_path / "lora")
    x = torch.randn(3, 6)
    torch.testing.assert_close(loaded(plain, tmp_path / "lora")(x), model(x))


def refused(model: nn.Module, tmp_path, *words: str) -> None:
    with pytest.raises(AuroraError) as caught:
        export_lora(model, tmp_path / "lora")
    assert all(word in str(caught.value) for word in words)
    assert list(tmp_path.iterdir()) == []


def test_gates_are_refused(tmp_path):
    refused(tiny_model(), tmp_path, "the gates cannot be folded into weights", "gate.form: none to export a LoRA")


def test_what_is_no_update_of_weights_is_refused(tmp_path):
    model = tiny_model(tuning="uniadapter", uniadapter={"rank": 4}, context={"form": "none"})
    refused(model, tmp_path, "uniadapter is no update of weights")


def test_layers_that_peft_would_pass_by_are_refused(tmp_path):
    """torch's own transformer computes with weights and calls no layer: a LoRA there would silently do nothing."""
    for targets, words in (
        (["self_attn"], "TransformerEncoderLayer reads its weight and does not call it"),
        (["linear1"], "TransformerEncoderLayer reads its weight and does not call it"),
        ([r"self_attn\.out_proj"], "peft adapts the output projection of a MultiheadAttention only with its other"),
    ):
        model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        inject_mode_approx(model, ModeApproxConfig(rank=2), targets)
        refused(model, tmp_path, words, "fold the adapter into the weights (merged_state_dict, lavis-aurora merge)")


def test_one_layer_in_two_places_is_refused(tmp_path):
    model = Nested()
    model.upper["key"] = model.key
    inject_mode_approx(model, ModeApproxConfig(rank=2), ["key"])
    refused(model, tmp_path, "upper.key and key are one layer")


def test_heads_that_peft_cannot_tell_apart_are_refused(tmp_path):
    model = ModeApproxModel(Nested(), ModeApproxConfig(rank=2, targets=[r"upper\.key"]), ["key"])
    refused(model, tmp_path, "peft cannot tell the trained module key from")


def test_a_folder_that_is_there_is_not_overwritten_and_nothing_is_half_written(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine").write_text("kept")
    with pytest.raises(AuroraError, match="lora is there already; name another folder"):
        export_lora(adapted_toy(), tmp_path / "lora")
    model = adapted_toy()
    with torch.no_grad():
        model.mode_approx.sets["default"].P[0, 0] = float("nan")
    with pytest.raises(AuroraError, match=r"qkv\.lora_B\.weight: not finite; nothing was written"):
        export_lora(model, tmp_path / "other")
    assert [path.name for path in tmp_path.rglob("*")] == ["lora", "mine"]
