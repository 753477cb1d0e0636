"""What the demo's pictures show and their captions say: scenes of shapes in two domains.

`clean` is for pretraining, `shifted` for tuning: it renders otherwise and words otherwise, and shares some
colors, shapes, positions and backgrounds with `clean`.
"""

from __future__ import annotations

import argparse
import random
import string
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tokenizers import BertWordPieceTokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CAPTIONS = 500  # of each domain, to train on
# for questions about pictures and short clips, and their short answers
_QUESTION_TEXT = """
what which how many much is are was were does do did has have can there it its this that these
where when why who
color colors shape shapes size sizes background picture image video frame object objects thing things position
yes no none zero one two three four five six seven eight nine ten both same different other any all only
left right up down top bottom center middle above below between next near far side inside outside
of from to into
moves move moving stays stay still appears appear disappears then before after first last again while until
turns grows shrinks changes becomes starts ends goes comes direction toward away fast slow number total
bigger smaller larger biggest smallest more less than not or and the a an in on at with over under
"""
QUESTION_WORDS = tuple(_QUESTION_TEXT.split())


def _pieces() -> list[str]:
    """Single characters, at the start of a word and within one, so that no ASCII text is [UNK]."""
    # the tokenizer lower-cases its text, and a punctuation mark is always a word by itself
    alphanumeric = string.digits + string.ascii_lowercase
    return [*string.punctuation, *alphanumeric, *(f"##{character}" for character in alphanumeric)]


def _corpus() -> Iterator[str]:
    for domain in DOMAINS:
        yield from islice(iter_captions(domain), CAPTIONS)
    for _ in range(2):  # words of the tables need not occur in the sampled captions; twice: see min_frequency
        yield " ".join([*QUESTION_WORDS, *(word for domain in DOMAINS.values() for word in domain.words())])


def _trained_words() -> list[str]:
    """The whole words that WordPiece training ends with, sorted."""
    corpus = list(_corpus())
    tokenizer = BertWordPieceTokenizer()
    # room for every merge: training ends when each word of the corpus is one token
    tokenizer.train_from_iterator(
        corpus, vocab_size=30_000, min_frequency=2, special_tokens=[*SPECIAL_TOKENS], show_progress=False
    )
    # Fragments are dropped: which of them appear depends on how the trainer breaks ties, and that differs
    # from run to run. The whole words are always the same.
    whole = {word for text in corpus for word in text.split()}
    return sorted(whole.intersection(tokenizer.get_vocab()).difference(_pieces()))


def write_vocabulary(folder: str | Path, size: int = 400) -> Path:
    """Writes `folder/vocab.txt`, which transformers' `BertTokenizer.from_pretrained(folder)` reads.

    One token a line: the special tokens, then single characters, then every word of both picture domains and
    of the demo's questions, then `[unused0]` and so on up to `size`: a new word need not change the size of
    the embedding. The same code writes the same bytes.

    Args:
        folder: made if missing.
        size: number of tokens.

    Returns:
        The path of vocab.txt.

    Raises:
        ValueError: if `size` is too small to hold every word.
    """
    tokens = [*SPECIAL_TOKENS, *_pieces(), *_trained_words()]
    if len(tokens) > size:
        raise ValueError(f"vocabulary size {size} is too small: the demo's words need {len(tokens)}")
    tokens += [f"[unused{number}]" for number in range(size - len(tokens))]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.txt"
    path.write_bytes("".join(f"{token}\n" for token in tokens).encode())  # bytes: no \r\n on any system
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `write_vocabulary`."""
    parser = argparse.ArgumentParser(description="Write the demo's WordPiece vocabulary.")
    parser.add_argument("folder", help="where vocab.txt goes")
    parser.add_argument("--size", type=int, default=400, help="number of tokens (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        print(write_vocabulary(args.folder, args.size))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()


SPLITS = ("train", "val", "test")
SHAPE_COUNTS = (0.15, 0.75, 0.10)  # how often a picture has one, two and three shapes
RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Domain:
    """How one domain looks and reads.

    Args:
        colors, backgrounds: word -> RGB, 0 to 255.
        shapes: words, each a key of `pictures._OUTLINES`.
        sizes: word -> radius in pixels of the finished picture.
        positions: nine phrases, row by row from the top left.
        phrases: templates of the first, second and third shape, with {size}, {color}, {shape} and {position}.
        ending: template of the background, with {background}.
        jitter: largest offset from the cell's middle, pixels.
        rotation: largest turn either way, degrees.
        stripes: how much darker every second stripe of a shape is, 0 to 1.
        gradient: how far the background fades to grey, 0 to 1.
        noise: standard deviation in grey levels.
    """

    colors: Mapping[str, RGB]
    shapes: Sequence[str]
    sizes: Mapping[str, float]
    backgrounds: Mapping[str, RGB]
    positions: Sequence[str]
    phrases: tuple[str, str, str]
    ending: str
    jitter: float = 1.0
    rotation: float = 0.0
    stripes: float = 0.0
    gradient: float = 0.0
    noise: float = 0.0

    def words(self) -> list[str]:
        """Every word that its captions can hold, sorted."""
        names = {*self.colors, *self.shapes, *self.sizes, *self.backgrounds}
        texts = " ".join([*self.positions, *self.phrases, self.ending]).split()
        return sorted(names.union(word for word in texts if "{" not in word))


DOMAINS: dict[str, Domain] = {
    "clean": Domain(
        colors={
            "red": (225, 25, 25), "blue": (35, 70, 235), "yellow": (255, 215, 0),
            "green": (20, 155, 50), "orange": (255, 125, 10), "purple": (140, 40, 190),
        },
        shapes=("circle", "triangle", "star", "square", "cross", "diamond"),
        sizes={"small": 5.3, "large": 9.5},
        backgrounds={
            "white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128), "beige": (226, 206, 172),
        },
        positions=(
            "at the top left", "at the top", "at the top right",
            "on the left", "in the center", "on the right",
            "at the bottom left", "at the bottom", "at the bottom right",
        ),
        phrases=(
            "a {size} {color} {shape} {position}",
            " and a {size} {color} {shape} {position}",
            " and a {size} {color} {shape} {position}",
        ),
        ending=" on a {background} background",
    ),
    "shifted": Domain(
        colors={
            "red": (225, 25, 25), "blue": (35, 70, 235), "yellow": (255, 215, 0),
            "cyan": (0, 185, 220), "pink": (255, 95, 185), "brown": (140, 80, 35),
        },
        shapes=("circle", "triangle", "star", "ring", "heart", "bar"),
        sizes={"small": 5.3, "big": 9.5},
        backgrounds={
            "white": (255, 255, 255), "black": (0, 0, 0), "mint": (165, 235, 190), "lilac": (200, 175, 245),
        },
        positions=(
            "upper left", "upper center", "upper right",
            "center left", "center", "center right",
            "lower left", "lower center", "lower right",
        ),
        phrases=(
            "there is a {size} {color} {shape} at {position}",
            " while a {size} {color} {shape} sits at {position}",
            " and a {size} {color} {shape} rests at {position}",
        ),
        ending=" over a {background} backdrop",
        jitter=1.5, rotation=25.0, stripes=0.3, gradient=0.35, noise=9.0,
    ),
}  # fmt: skip


class Shape(NamedTuple):
    """One shape of a scene: its cell (0 to 8, row by row) and the domain's words for the rest."""

    cell: int
    size: str
    color: str
    shape: str


class Scene(NamedTuple):
    """What a caption tells and a picture shows."""

    shapes: tuple[Shape, ...]
    background: str

    def split(self) -> str:
        """The split that this scene belongs to, whatever the counts, seed and order of its shapes.

        By a checksum, eight scenes in ten train, one validates, one tests: so no caption is in two splits,
        even if these are generated in separate runs or from other seeds.
        """
        bucket = zlib.crc32(repr((sorted(self.shapes), self.background)).encode()) % 10
        return {0: "val", 1: "test"}.get(bucket, "train")


def domain_of(name: str) -> Domain:
    """The domain of that name.

    Raises:
        ValueError: for an unknown one.
    """
    if name not in DOMAINS:
        raise ValueError(f"unknown domain {name!r}: choose one of {', '.join(DOMAINS)}")
    return DOMAINS[name]


def iter_scenes(name: str, split: str, seed: int, shape_counts: Sequence[float] = SHAPE_COUNTS) -> Iterator[Scene]:
    """Endless distinct scenes of a split; a longer draw begins with the shorter one."""
    domain, rng = domain_of(name), random.Random(f"{seed}/{name}/{split}")
    seen = set()
    while True:
        cells = rng.sample(range(9), rng.choices((1, 2, 3), shape_counts)[0])
        shapes = (
            Shape(cell, rng.choice([*domain.sizes]), rng.choice([*domain.colors]), rng.choice(domain.shapes))
            for cell in cells
        )
        scene = Scene(tuple(shapes), rng.choice([*domain.backgrounds]))
        # two orders of the same shapes are the same picture
        key = (frozenset(scene.shapes), scene.background)
        if scene.split() == split and key not in seen:
            seen.add(key)
            yield scene


def caption_of(scene: Scene, domain: Domain) -> str:
    """The caption, lower case without punctuation; it names every factor of the scene."""
    parts = [
        phrase.format(size=s.size, color=s.color, shape=s.shape, position=domain.positions[s.cell])
        for phrase, s in zip(domain.phrases, scene.shapes)
    ]
    return "".join(parts) + domain.ending.format(background=scene.background)


def iter_captions(domain: str, seed: int = 0, split: str = "train") -> Iterator[str]:
    """Endless distinct captions: those that `generate_pictures` writes for the same seed, in the same order.

    Raises:
        ValueError: for an unknown domain or split.
    """
    check_splits([split])
    spec = domain_of(domain)
    return (caption_of(scene, spec) for scene in iter_scenes(domain, split, seed))


def check_splits(splits: Sequence[str]) -> None:
    """Refuse a split that is not one of SPLITS."""
    unknown = [split for split in splits if split not in SPLITS]
    if unknown:
        raise ValueError(f"unknown split {unknown[0]!r}: choose from {', '.join(SPLITS)}")
