"""The demo's WordPiece vocabulary: small, and made of what its captions, questions and answers say.

Written by `python -m lavis_aurora.demo.vocabulary FOLDER`.
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from tokenizers import BertWordPieceTokenizer

from lavis_aurora.demo.scenes import DOMAINS, iter_captions

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
