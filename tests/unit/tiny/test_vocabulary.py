"""The tokenizer that ships with the tiny Wan."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
import sentencepiece

from diffsynth.tiny import tiny_folder
from diffsynth.tiny.grammar import caption, known_words, random_scene

FILE = tiny_folder() / "google" / "umt5-xxl" / "spiece.model"
SCRIPT = Path(__file__).parents[3] / "train" / "tiny" / "vocabulary.py"


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(FILE))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_vocabulary", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_special_pieces_are_those_of_umt5(pieces: sentencepiece.SentencePieceProcessor) -> None:
    assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id(), pieces.bos_id()) == (0, 1, 2, -1)
    assert pieces.vocab_size() == 640
    assert FILE.stat().st_size < 300_000


def test_captions_are_read_word_by_word_and_come_back(
    pieces: sentencepiece.SentencePieceProcessor,
) -> None:
    rng = random.Random(0)
    for index in range(300):
        text = caption(random_scene(rng, 1 + index % 2), rng)
        ids = pieces.encode(text)
        assert pieces.decode(ids) == text.lower()
        assert len(ids) == len(text.replace(",", " ,").replace(".", " .").split())


def test_known_and_reserved_words_are_one_piece_each(
    pieces: sentencepiece.SentencePieceProcessor, script: ModuleType
) -> None:
    words = [*known_words(), *script.RESERVED_WORDS.split()]
    assert len(script.RESERVED_WORDS.split()) > 150
    assert [word for word in words if len(pieces.encode(word)) != 1] == []


def test_an_empty_prompt_is_the_end_piece_alone(pieces: sentencepiece.SentencePieceProcessor) -> None:
    assert pieces.encode("", add_eos=True) == [1]


@pytest.mark.parametrize("text", ["色调艳丽，过曝，静态，细节模糊不清", "ÿ🙂 наука", "xylophone quartz, №7"])
def test_any_text_is_read_by_letters_and_bytes(
    pieces: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    ids = pieces.encode(text)
    assert pieces.unk_id() not in ids
    assert set(ids) <= set(range(pieces.vocab_size()))


def test_capital_letters_make_no_difference(pieces: sentencepiece.SentencePieceProcessor) -> None:
    assert pieces.encode("A Red CIRCLE") == pieces.encode("a red circle")


@pytest.mark.slow
def test_the_script_makes_the_shipped_file(script: ModuleType) -> None:
    assert script.train_vocabulary(640) == FILE.read_bytes()
