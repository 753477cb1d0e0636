"""Texts as a model reads them: which are repeated, shared by several pictures, cut, or of unknown words alone."""

from __future__ import annotations

import copy
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Optional

from lavis_aurora.common.errors import AuroraError, shown

ENTITY = re.compile(r"&#?\w+;")
LINE_BREAK = re.compile(r"\S\s*[\n\r]\s*\S")
UNESCAPE = "write the characters that they mean, Python's html.unescape"


def has_entity(text: str) -> bool:
    """Whether a text holds an HTML entity: BLIP's processors leave its letters."""
    return "&" in text and ENTITY.search(text) is not None


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
        entities: with HTML entities, whose letters BLIP's processors leave.
        line_breaks: with a line break in their midst.
        examples: by the names above, the first text of those that are counted.
    """

    texts: int
    texts_each: tuple[int, float, int]
    repeated_texts: int
    shared_texts: int
    cut_words: int
    cut_tokens: Optional[int]
    unknown_texts: Optional[int]
    entities: int
    line_breaks: int
    examples: dict[str, str] = field(default_factory=dict)

    def lines(
        self, kind: str, shared: Optional[str], words: tuple[int, str], tokens: Optional[TokenLimit]
    ) -> Iterator[tuple[Literal["note", "warning"], str]]:
        """What there is to say, each with its level.

        Args:
            kind: image or video.
            shared: what follows for texts of several; None to leave these out.
            words: where the text processor cuts, and the key that raises it.
            tokens: where the model does.
        """
        limit, key = (0, "") if tokens is None else (tokens.limit + 2, tokens.key)
        said: list[tuple[Literal["note", "warning"], str, str, Optional[str]]] = [
            ("note", "repeated_texts", f"repeat another of the same {kind}", ""),
            ("note", "shared_texts", f"are those of several {kind}s", shared),
            ("note", "cut_words", f"are cut at {words[0]} words", f"raise {words[1]} to keep them whole"),
            ("note", "cut_tokens", f"are cut at {limit} tokens", f"raise {key} to keep them whole"),
            ("warning", "unknown_texts", "have no word that the vocabulary knows", "the model reads them all alike"),
            ("warning", "entities", "hold HTML entities", UNESCAPE),
            ("note", "line_breaks", "hold line breaks", "the model reads them as spaces"),
        ]
        for level, name, what, why in said:
            number = getattr(self, name)
            if number and why is not None:
                text = f"{number} of {self.texts} texts {what}, e.g. {shown(self.examples[name])}"
                yield level, f"{text}; {why}" if why else text


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
    counts, examples = Counter[str](), dict[str, str]()
    for i, (path, texts) in enumerate(entries):
        each[path] += len(texts)
        for raw in texts:
            text = read.get(raw)
            if text is None:
                text = read[raw] = process(raw)
            length, known = (1, True) if tokens is None else tokens(text)
            if not length or not text.strip():
                raise AuroraError(f"nothing is left of {shown(raw)}, a text of entry {i}; correct it or leave it out")
            pair = hash((path, text))  # of millions of pairs, numbers alone
            found = {
                "repeated_texts": pair in pairs,
                "cut_words": text.count(" ") + 1 >= limit and whole(raw) != text,
                "cut_tokens": tokens is not None and length > tokens.tokens.limit,
                "unknown_texts": not known,
                "entities": has_entity(raw),
                "line_breaks": ("\n" in raw or "\r" in raw) and LINE_BREAK.search(raw) is not None,
            }
            for name in (name for name, holds in found.items() if holds):
                counts[name] += 1
                examples.setdefault(name, raw)
            times[text] += 1
            pairs.add(pair)
            owners[text] += not found["repeated_texts"]
    shared = [text for text, count in owners.items() if count > 1]
    examples.update({"shared_texts": shared[0]} if shared else {})
    total = sum(each.values())
    return TextCounts(
        texts=total,
        texts_each=(min(each.values()), round(total / len(each), 2), max(each.values())),
        repeated_texts=counts["repeated_texts"],
        shared_texts=sum(map(times.__getitem__, shared)),
        cut_words=counts["cut_words"],
        cut_tokens=None if tokens is None else counts["cut_tokens"],
        unknown_texts=None if tokens is None else counts["unknown_texts"],
        entities=counts["entities"],
        line_breaks=counts["line_breaks"],
        examples=examples,
    )
