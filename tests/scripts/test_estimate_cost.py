"""The count of operations beside torch's own, and the figures of the YAMLs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from estimate_cost import DATA, benchmark_yamls, estimate, main, retrieval_sample, table, vision
from omegaconf import OmegaConf
from tiny import tiny_model
from tiny_retrieval import batch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("size", [48, 96])
def test_a_step_is_what_torch_counts(size):
    """Of the tiny model; the folding of the update, once a step, is left out of the count."""
    pairs = 24
    model = tiny_model(image_size=size, queue_size=0, vit_grad_ckpt=False, mode_approx={"rank": 2}).train()
    one = batch(4)
    samples = {
        **one,
        "image": torch.randn(pairs, 3, size, size),
        "text_input": one["text_input"] * (pairs // 4),
        "image_id": torch.arange(pairs),
    }
    tokens = model.tokenize(samples["text_input"], pad_to_longest=True).input_ids.shape[1]
    with FlopCounterMode(display=False) as counted:
        model(samples)["loss"].backward()
    width, layers = model.visual_encoder.embed_dim, len(model.visual_encoder.blocks)
    patch = model.visual_encoder.patch_embed.proj.kernel_size[0]
    seen = (size // patch) ** 2 + 1
    sizes = {"width": width, "layers": layers}
    expected = retrieval_sample(vision(seen, width, layers, patch), seen, tokens, 2, **sizes)
    assert counted.get_total_flops() / pairs == pytest.approx(expected, rel=0.1)


def test_the_benchmarks_have_a_row_each():
    paths = benchmark_yamls()
    names = {str(path.relative_to(ROOT / "projects/aurora").with_suffix("")) for path in paths}
    plain = {"coco_ret", "flickr_ret", "vqav2", "msrvtt_ret", "didemo_ret", "msrvtt_qa"}
    plain |= {"zeroshot_msrvtt", "zeroshot_didemo"}
    assert names == plain | {f"released/{name}" for name in plain}
    lines = table(paths, 8, 50.0).splitlines()
    assert {line.count(" | ") for line in (lines[0], *lines[2:])} == {8} and len(lines) == 2 + len(names)


def test_figures_follow_the_yaml():
    cfg = OmegaConf.load(ROOT / "projects/aurora/flickr_ret.yaml")
    whole = estimate(cfg)
    assert whole.steps == 6 * (DATA["flickr30k"].train // 128)
    assert whole.train == pytest.approx(6 * 145_000 * whole.sample)
    half = estimate(OmegaConf.merge(cfg, {"run": {"max_epoch": 3, "batch_size_train": 8}}))
    assert half.train == pytest.approx(whole.train / 2) and half.memory < whole.memory and half.test == whole.test
    assert estimate(OmegaConf.load(ROOT / "projects/aurora/zeroshot_didemo.yaml")).train == 0


def test_the_page_has_the_table_of_the_script():
    page = (ROOT / "docs/reproduce.md").read_text()
    assert table(benchmark_yamls(), 8, 50.0) in page


@pytest.mark.parametrize(
    "given, said",
    [
        (["projects/aurora/own_ret.yaml"], "how large own_retrieval is, is not known here; known: coco_retrieval, "),
        (["nothing.yaml"], "nothing.yaml: no YAML of a run: "),
        (["README.md"], "README.md: no YAML of a run: "),
        (["setup.cfg"], "setup.cfg: no YAML of a run: "),
        (["--processes", "0"], "are to be above 0"),
        (["--tflops", "0"], "are to be above 0"),
    ],
)
def test_what_it_cannot_count_is_an_error(given, said, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_one_process_is_one(capsys):
    main([str(ROOT / "projects/aurora/coco_ret.yaml"), "--processes", "1"])
    assert "| steps of 1 process |" in (said := capsys.readouterr().out) and "| of 1 GPU |" in said
