"""Teach the demo's tiny BLIP, as pretrained for retrieval, to answer questions about clean pictures.

    python scripts/pretrain_tiny_vqa.py

The vision encoder stays as it is, so that a picture is encoded once. In each step several questions are drawn about
each picture: a kind, a wording, then an answer, so that yes is right as often as no. "say mint" is asked too, with
every word that is an answer in some domain: a decoder taught never to give a word would never give it, and a large
BLIP has read all of them. What they look like it does not learn. The weights are then tested: the shares of right
answers by kind, on test pictures. Only then do they replace an older file, and only if every kind reaches --least.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import lavis_aurora_compat  # noqa: F401

import numpy as np
import torch
from lavis.common.registry import registry
from make_tiny_weights import replacing, stored_weights
from omegaconf import OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.paths import package_file
from lavis_aurora.demo.pictures import render
from lavis_aurora.demo.questions import KINDS, SHAPE_COUNTS, answers_of, askable, iter_questions
from lavis_aurora.demo.scenes import DOMAINS, Scene, domain_of, iter_scenes
from lavis_aurora.models.blip_vqa_aurora import BlipVqaAurora
from lavis_aurora.models.loading import load_model_and_preprocess, load_preprocess

ARCH, DOMAIN = "blip_vqa_aurora", "clean"
START = package_file("configs/models/tiny/model.safetensors")
TARGET = package_file("configs/models/tiny/vqa.safetensors")
# How often each kind is drawn: at first yes, no and positions alone. Retrieval has taught the encoder to tell whether
# a text fits a picture, and where what is. Asked for all kinds at once it forgets that before it is of use: yes and
# no were at chance after 1,500 steps. Later what is hardest is asked for most.
FIRST = {"yes/no": 1.0, "position": 1.0}
SHARES = {"color": 1.0, "shape": 1.0, "count": 1.8, "position": 0.3, "yes/no": 1.5, "word": 0.6}
WARMUP = 100
# What can be asked about a picture: texts by kind, wording and answer.
Asked = Mapping[str, Sequence[Mapping[str, Sequence[str]]]]
WORDS = {word: [f"say {word}"] for domain in DOMAINS for word in answers_of(domain)}


def asked_about(scene: Scene) -> Asked:
    """Every question that a scene answers."""
    asked: dict[str, list[Mapping[str, Sequence[str]]]] = {"word": [WORDS]}
    for kind, wordings in askable(scene, DOMAIN).items():
        for questions in filter(None, wordings):
            texts = defaultdict(list)
            for question in questions:
                texts[question.answer].append(sys.intern(question.text))  # thousands of pictures share them
            asked.setdefault(kind, []).append(texts)
    return asked


def draw(asked: Asked, count: int, shares: Mapping[str, float], rng: random.Random) -> list[tuple[str, str]]:
    """Questions about one picture with their answers."""
    drawn = []
    for kind in rng.choices([*asked], [shares.get(kind, 0.0) for kind in asked], k=count):
        texts = rng.choice(asked[kind])
        answer = rng.choice([*texts])
        drawn.append((rng.choice(texts[answer]), answer))
    return drawn


def pictures_of(split: str, count: int, processor: nn.Module) -> tuple[list[Scene], Tensor]:
    """The first scenes to ask about, and their pictures, (count, 3, height, width)."""
    domain, rng = domain_of(DOMAIN), np.random.default_rng(0)
    scenes = list(islice(iter_scenes(DOMAIN, split, 0, SHAPE_COUNTS), count))
    drawn = tqdm(scenes, desc=f"drawing {split}", unit="picture")
    return scenes, torch.stack([processor(render(scene, domain, rng)) for scene in drawn])


def loss_of(model: BlipVqaAurora, visual: Tensor, asked: Sequence[tuple[str, str]]) -> Tensor:
    """BLIP's loss of the answers; a picture's tokens for each question, (questions, tokens, d)."""
    questions = model.tokenize([text for text, _ in asked], pad_to_longest=True, device=model.device)
    questions.input_ids[:, 0] = model.tokenizer.enc_token_id
    encoded = model.text_encoder.forward_automask(questions, visual)
    samples = {
        "image": visual,  # LAVIS reads the size of the batch from it
        "tokenized_text": questions,
        "answer": [answer for _, answer in asked],
        "n_answers": [1] * len(asked),
        "weight": torch.ones(len(asked)),
    }
    return model.forward_decoder(samples, encoded)[0]


def right_answers(model: BlipVqaAurora, images: Tensor, split: str, each: int) -> dict[str, float]:
    """Share of right answers by kind, in percent: of ``each`` questions about each picture of a split."""
    right, answers = defaultdict(list), answers_of(DOMAIN)
    asked = list(islice(iter_questions(DOMAIN, split, 0, each), each * len(images)))
    for first in range(0, len(asked), 100):
        part = asked[first : first + 100]
        samples = {"image": images[[index for index, _, _ in part]], "text_input": [q.text for _, q, _ in part]}
        for (_, question, _), answer in zip(part, model.predict_answers(samples, answer_list=answers)):
            right[question.kind].append(answer == question.answer)
    return {kind: 100 * sum(right[kind]) / len(right[kind]) for kind in KINDS if kind in right}


def words_said(model: BlipVqaAurora, image: Tensor) -> float:
    """Share of WORDS that it gives where asked to say them, in percent."""
    samples = {"image": image.expand(len(WORDS), -1, -1, -1), "text_input": [text for (text,) in WORDS.values()]}
    said = model.predict_answers(samples, answer_list=[*WORDS])
    return 100 * sum(map(str.__eq__, said, WORDS)) / len(WORDS)


def shown(shares: Mapping[str, float]) -> str:
    """One line of shares by kind."""
    return ", ".join(f"{kind} {share:.1f}" for kind, share in shares.items())


def share_of_rate(step: int, steps: int, fall: float) -> float:
    """Of the highest learning rate, after ``step`` steps: it rises for WARMUP, and falls in the last ``fall``."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (steps * fall))


def train(
    model: BlipVqaAurora, features: Tensor, asked: Sequence[Asked], validation: Tensor, args: argparse.Namespace
) -> None:
    """AdamW on random batches; now and then it says the shares of right answers about validation pictures."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, args.steps, args.fall))
    rng, progress = random.Random(0), tqdm(range(1, args.steps + 1), unit="step")
    model.train()
    for step in progress:
        chosen = rng.sample(range(len(asked)), args.batch)
        shares = FIRST if step <= args.first else SHARES
        questions = [one for index in chosen for one in draw(asked[index], args.each, shares, rng)]
        loss = loss_of(model, features[chosen].repeat_interleave(args.each, dim=0), questions)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % args.validate_every == 0:
            progress.write(f"step {step}, val: {shown(right_answers(model, validation, 'val', each=4))}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--start", type=Path, default=Path(START), help="default: the weights for retrieval in the package"
    )
    parser.add_argument("--steps", type=int, default=4800, help="default: %(default)s")
    parser.add_argument(
        "--first", type=int, default=1000, help="steps of yes, no and positions alone (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=24, help="pictures of a step (default: %(default)s)")
    parser.add_argument("--each", type=int, default=4, help="questions about each (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument(
        "--fall", type=float, default=0.5, help="share of the steps, in which it falls (default: %(default)s)"
    )
    parser.add_argument("--pictures", type=int, default=3000, help="to train on (default: %(default)s)")
    parser.add_argument("--test", type=int, default=500, help="pictures to test on (default: %(default)s)")
    parser.add_argument("--validate-every", type=int, default=250, metavar="STEPS", help="default: %(default)s")
    parser.add_argument(
        "--least", type=float, default=85, metavar="PERCENT", help="to replace a file (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path(TARGET), help="default: the file in the package")
    args = parser.parse_args()
    try:
        make(args)
    except AuroraError as error:
        sys.exit(f"error: {error}")


def make(args: argparse.Namespace) -> None:
    """Train, and test what was written; it replaces an older file if it is good enough.

    Raises:
        AuroraError: it is not.
    """
    torch.manual_seed(0)
    cfg = OmegaConf.load(BlipVqaAurora.default_config_path("tiny"))
    start = {"pretrained": str(args.start), "tuning": "full", "freeze_vit": True}
    model = registry.get_model_class(ARCH).from_config(OmegaConf.merge(cfg.model, start))
    processor = load_preprocess(cfg.preprocess)[0]["eval"]
    scenes, images = pictures_of("train", args.pictures, processor)
    with torch.no_grad():
        features = torch.cat([model.visual_encoder.eval()(part) for part in images.split(100)])
    asked = [asked_about(scene) for scene in tqdm(scenes, desc="asking", unit="picture")]
    train(model, features, asked, pictures_of("val", min(args.test, 75), processor)[1], args)
    images, kept = pictures_of("test", args.test, processor)[1], stored_weights(model)
    with replacing(args.output, kept, "scripts/pretrain_tiny_vqa.py") as written:
        tested, _, _ = load_model_and_preprocess(ARCH, "tiny", is_eval=True, pretrained=str(written))
        shares = {**right_answers(tested, images, "test", each=3), "words said": words_said(tested, images[0])}
        print(f"right answers on test, percent: {shown(shares)}")
        low = {kind: share for kind, share in shares.items() if share < args.least}
        if low and args.output.exists():
            raise AuroraError(f"below --least {args.least:g}: {shown(low)}")
    print(f"{len(kept)} tensors, {args.output.stat().st_size / 2**20:.2f} MiB: {args.output}")


if __name__ == "__main__":
    main()
