"""The demo's vocabulary: complete for its captions, reproducible, and the same as the shipped file."""

from __future__ import annotations

import string
from itertools import islice
from pathlib import Path

import pytest
from transformers import BertTokenizer

from lavis_aurora.demo import scenes
from lavis_aurora.demo.scenes import DOMAINS, QUESTION_WORDS, iter_captions, write_vocabulary

SHIPPED = Path(scenes.__file__).parents[1] / "configs" / "models" / "tiny" / "vocab.txt"
SIZE = 400
MAX_TOKENS = 35  # where BLIP cuts a caption, special tokens included


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"), SIZE).parent


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> BertTokenizer:
    return BertTokenizer.from_pretrained(str(folder))


def test_file_has_special_tokens_first_and_no_token_twice(folder: Path) -> None:
    tokens = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(tokens) == len({*tokens}) == SIZE


def test_tokenizer_knows_its_special_tokens(tokenizer: BertTokenizer) -> None:
    ids = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert ids == [0, 1, 2, 3] and tokenizer.mask_token_id == 4
    assert tokenizer.vocab_size == SIZE


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_caption_tokenizes_and_decodes_to_itself(tokenizer: BertTokenizer, domain: str) -> None:
    for caption in islice(iter_captions(domain, seed=7), 300):
        ids = tokenizer(caption).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == len(caption.split()) + 2 <= MAX_TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption


def test_every_word_is_one_token(tokenizer: BertTokenizer) -> None:
    words = {*QUESTION_WORDS}.union(*(domain.words() for domain in DOMAINS.values()))
    assert [word for word in sorted(words) if tokenizer.tokenize(word) != [word]] == []


@pytest.mark.parametrize("text", ["Zebra-striped Quartz, 1907!", "x" * 40, string.printable, "(a+b)*c_d^2"])
def test_no_ascii_text_is_unknown(tokenizer: BertTokenizer, text: str) -> None:
    tokens = tokenizer.tokenize(text)
    assert tokens and "[UNK]" not in tokens


def test_shipped_file_is_a_fresh_one(folder: Path) -> None:
    # to write it anew: python -m lavis_aurora.demo.scenes lavis_aurora/configs/models/tiny
    # (weights that were pretrained with the old one are void then)
    assert SHIPPED.read_bytes() == (folder / "vocab.txt").read_bytes()


def test_same_bytes_each_time(tmp_path: Path, folder: Path) -> None:
    # the trainer's own order differs from call to call
    for index in range(3):
        path = write_vocabulary(tmp_path / str(index), SIZE)
        assert path.read_bytes() == (folder / "vocab.txt").read_bytes()


def test_too_small_a_size_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"vocabulary size 100 is too small: the demo's words need \d+"):
        write_vocabulary(tmp_path, 100)
    with pytest.raises(SystemExit):
        scenes.main([str(tmp_path), "--size", "100"])
    assert "too small" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scenes.main([str(tmp_path), "--size", "500"])
    path = tmp_path / "vocab.txt"
    assert capsys.readouterr().out.strip() == str(path)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 500
