"""Counting of texts, against BERT's tokenizer and plain loops."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.processors.blip_processors import BlipCaptionProcessor
from tiny import CAPTIONS, tiny_config

from lavis_aurora.data.texts import TokenCounter, TokenLimit, count_texts
from lavis_aurora.encoders.towers import build_tokenizer

TOKENIZER = build_tokenizer(tiny_config().tokenizer)
COUNTER = TokenCounter(TokenLimit(TOKENIZER, 5, "key"))
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})


@settings(deadline=None)
@given(st.lists(st.sampled_from([*WORDS, "star-shaped", "don't", "Ωx", "猫が", "a/b", "[ENC]"]), max_size=9))
def test_tokens_are_those_of_the_whole_text(words: list[str]) -> None:
    text = " ".join(words)
    found = TOKENIZER.tokenize(text)
    assert COUNTER(text) == (len(found), any(token != "[UNK]" for token in found))


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("pqr"), st.lists(st.sampled_from(["a", "A!", "a b", "a b c d e f"]), min_size=1)),
        min_size=1,
    )
)
def test_counts_equal_plain_loops(entries: list[tuple[str, list[str]]]) -> None:
    counts = count_texts(entries, BlipCaptionProcessor(max_words=3), None)
    pairs = [(path, raw.lower().strip("!")) for path, texts in entries for raw in texts]
    pairs = [(path, " ".join(text.split()[:3])) for path, text in pairs]
    assert counts.texts == len(pairs)
    assert counts.repeated_texts == sum(pair in pairs[:i] for i, pair in enumerate(pairs))
    assert counts.shared_texts == sum(any(t == text and p != path for p, t in pairs) for path, text in pairs)
    assert counts.cut_words == sum(raw == "a b c d e f" for _, texts in entries for raw in texts)
    assert counts.cut_tokens is None and counts.unknown_texts is None
