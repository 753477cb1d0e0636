"""Texts as a model reads them: which are repeated, shared by several pictures, cut, or of unknown words alone."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

from lavis_aurora.common.errors import AuroraError, shown


class TokenLimit(NamedTuple):
    """Where a model cuts texts.

    Attributes:
        tokenizer: the model's, of transformers.
        limit: tokens of a text, [CLS] and [SEP] not among them.
        key: of the YAML, that raises it.
    """

    tokenizer: Any
    limit: int
    key: str


class TokenCounter:
    """Counts tokens of texts: BERT's tokenizer makes the same of a word in any text, and few words are new."""

    def __init__(self, tokens: TokenLimit) -> None:
        self.tokens = tokens
        self._counts: dict[str, int] = {}
        self._known: set[str] = set()

    def __call__(self, text: str) -> tuple[int, bool]:
        """Tokens of a text, and whether the vocabulary knows any of them."""
        words = text.split()
        for word in words:
            if word not in self._counts:
                found = self.tokens.tokenizer.tokenize(word)
                self._counts[word] = len(found)
                if any(token != self.tokens.tokenizer.unk_token for token in found):
                    self._known.add(word)
        return sum(map(self._counts.__getitem__, words)), not self._known.isdisjoint(words)


@dataclass
class TextCounts:
    """Of the texts of a split.

    Attributes:
        texts: all of them.
        texts_each: fewest, mean and most texts of a picture.
        repeated_texts: equal to another one of the same picture.
        shared_texts: equal to one of another picture.
        cut_words: cut by the text processor.
        cut_tokens: cut by the model; None where that is not known.
        unknown_texts: without any word of the vocabulary; likewise.
    """

    texts: int
    texts_each: tuple[int, float, int]
    repeated_texts: int
    shared_texts: int
    cut_words: int
    cut_tokens: Optional[int]
    unknown_texts: Optional[int]


def count_texts(
    entries: Iterable[tuple[str, Sequence[str]]], process: Callable[[str], str], tokens: Optional[TokenCounter]
) -> TextCounts:
    """Count texts as the model reads them.

    Args:
        entries: a picture's path, and texts of it; in the order of the annotations.
        process: the text processor.
        tokens: counts the model's; None if they are not known.

    Raises:
        AuroraError: nothing is left of a text.
    """
    limit: Any = getattr(process, "max_words", sys.maxsize)
    whole = copy.copy(process)
    if limit < sys.maxsize:
        whole.max_words = sys.maxsize  # type: ignore[attr-defined]
    read: dict[str, str] = {}
    pairs: set[int] = set()
    each, times, owners = Counter[str](), Counter[str](), Counter[str]()
    cut_words, cut_tokens, unknown = 0, 0, 0
    for i, (path, texts) in enumerate(entries):
        each[path] += len(texts)
        for raw in texts:
            text = read.get(raw)
            if text is None:
                text = read[raw] = process(raw)
            length, known = (1, True) if tokens is None else tokens(text)
            if not length or not text.strip():
                raise AuroraError(f"nothing is left of {shown(raw)}, a text of entry {i}; correct it or leave it out")
            cut_words += text.count(" ") + 1 >= limit and whole(raw) != text
            cut_tokens += tokens is not None and length > tokens.tokens.limit
            unknown += not known
            times[text] += 1
            pair = hash((path, text))  # of millions of pairs, numbers alone
            if pair not in pairs:
                pairs.add(pair)
                owners[text] += 1
    total = sum(each.values())
    return TextCounts(
        texts=total,
        texts_each=(min(each.values()), round(total / len(each), 2), max(each.values())),
        repeated_texts=total - len(pairs),
        shared_texts=sum(times[text] for text, count in owners.items() if count > 1),
        cut_words=cut_words,
        cut_tokens=None if tokens is None else cut_tokens,
        unknown_texts=None if tokens is None else unknown,
    )
