"""Prompts to features: cleaned, cut, encoded once, and warned of where a small model does not know them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffsynth.conditioning.conditioner import Geometry
from diffsynth.conditioning.text import TextConditioner, TextInputs
from diffsynth.conditioning.tokenizer import END_OF_TEXT, PADDING, Tokenizer, find_tokenizer
from diffsynth.errors import ArgumentError, TokenizerNotFoundError
from diffsynth.tiny import tiny_folder

VOCABULARY = tiny_folder() / "google" / "umt5-xxl" / "spiece.model"
CPU = torch.device("cpu")
GEOMETRY = Geometry(
    num_videos=1, num_frames=5, height=16, width=16, latent_channels=16, latent_frames=2, latent_height=2,
    latent_width=2,
)  # fmt: skip


class IdsAsFeatures:
    """A text encoder whose features are the ids, so that a test can read them."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        self.seen += ids.tolist()
        return ids[..., None].float()


@dataclass
class Parts:
    device: torch.device = CPU
    known_words: frozenset[str] = frozenset()
    text_encoder: IdsAsFeatures = field(default_factory=IdsAsFeatures)
    tokenizer: Tokenizer = field(default_factory=lambda: Tokenizer(VOCABULARY))
    vae: None = None


def encode(parts: Parts, **inputs: object) -> tuple[Tensor, Tensor | None]:
    given = TextInputs(**inputs)
    assert TextConditioner().applies(given, parts)
    text = TextConditioner().encode(given, GEOMETRY, parts).text
    assert text is not None
    return text


def test_rows_are_prompts_then_videos_padded_with_zeros() -> None:
    parts = Parts()
    short, long = (parts.tokenizer.encode(text) for text in ("red", "two blue squares move"))
    positive, negative = encode(parts, prompt=["red", "two blue squares move"], num_videos_per_prompt=2)
    assert positive.shape == (4, len(long), 1) and negative is not None and negative.shape == (4, 1, 1)
    for row, expected in zip(positive[..., 0].tolist(), (short, short, long, long), strict=True):
        assert row == expected + [0] * (len(long) - len(expected))
    assert parts.text_encoder.seen == [short, long, [END_OF_TEXT]], "no padding is encoded, nothing twice"


def test_texts_are_cleaned_before_they_are_encoded() -> None:
    parts = Parts()
    dirty, _ = encode(parts, prompt="  a &amp;amp; b \n  red ", cfg_scale=1.0)
    clean, negative = encode(parts, prompt="a & b red", cfg_scale=1.0)
    assert torch.equal(dirty, clean) and negative is None


def test_the_negative_side_is_encoded_only_where_it_is_read() -> None:
    for scales, is_guided in (
        ((1.0, None), False),
        ((1.0, 1.0), False),
        ((1.0, 3.0), True),
        ((3.0, 1.0), True),
    ):
        parts = Parts()
        _, negative = encode(
            parts, prompt="red", negative_prompt="blue", cfg_scale=scales[0], cfg_scale_low_noise=scales[1]
        )
        assert (negative is not None) == is_guided
        assert len(parts.text_encoder.seen) == 1 + is_guided


def test_unknown_words_of_a_small_model_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    parts = Parts(known_words=frozenset({"a", "red", "circle"}))
    with caplog.at_level(logging.WARNING, "diffsynth"):
        encode(parts, prompt="a red Circle", cfg_scale=1.0)
        assert caplog.text == ""
        encode(parts, prompt="a purple cat", cfg_scale=1.0)
        encode(parts, prompt="a purple dog", cfg_scale=1.0)
    told = [record.getMessage() for record in caplog.records]
    assert [text.split("'")[1] for text in told] == ["purple", "cat", "dog"]
    assert all(text.endswith("It knows: a, circle, red.") for text in told)
    caplog.clear()
    encode(replace(parts, known_words=frozenset()), prompt="a purple cat", cfg_scale=1.0)
    assert caplog.text == "", "a model that knows language is not asked"


def test_given_rows_pass_as_they_are() -> None:
    parts, rows = Parts(), torch.randn(2, 3, 8)
    positive, negative = encode(
        parts, prompt_embeds=rows, negative_prompt_embeds=rows[:1], num_videos_per_prompt=2
    )
    assert torch.equal(positive, rows.repeat_interleave(2, dim=0))
    assert negative is not None and torch.equal(negative, rows[:1].expand(4, -1, -1))
    assert parts.text_encoder.seen == []


@pytest.mark.parametrize("given", [0, 5, [None], {"a": 1}, [["a"]]])
def test_what_is_no_text_is_told(given: object) -> None:
    with pytest.raises(ArgumentError, match=r"prompt is .*; give a text, or a list of texts"):
        TextInputs(prompt=given)


def test_long_texts_are_cut_and_keep_their_end() -> None:
    tokenizer = Tokenizer(VOCABULARY, max_tokens=8)
    ids = tokenizer.encode("a red circle moves right and then down and left")
    assert len(ids) == 8 and ids[-1] == END_OF_TEXT
    assert tokenizer.encode("") == [END_OF_TEXT]


def test_a_batch_is_padded_behind_and_masked() -> None:
    tokenizer = Tokenizer(VOCABULARY)
    ids, mask = tokenizer.batch(["red", "two blue squares"])
    assert ids.shape == mask.shape and mask.sum(1).tolist() == [len(tokenizer.encode("red")), ids.shape[1]]
    assert (ids[mask == 0] == PADDING).all() and (
        ids.gather(1, mask.sum(1, keepdim=True) - 1) == END_OF_TEXT
    ).all()


def test_bytes_are_a_vocabulary_too() -> None:
    assert Tokenizer(VOCABULARY.read_bytes()).encode("red") == Tokenizer(VOCABULARY).encode("red")


@pytest.mark.parametrize("place", ["google/umt5-xxl", "tokenizer", ".", "../tokenizer"])
def test_the_tokenizer_is_found_in_the_usual_places(tmp_path: Path, place: str) -> None:
    encoder = tmp_path / "text_encoder" / "model.safetensors"
    encoder.parent.mkdir()
    folder = encoder.parent / place
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(VOCABULARY.read_bytes())
    assert find_tokenizer(encoder).samefile(folder / "spiece.model")


def test_a_tokenizer_that_is_nowhere_lists_the_places(tmp_path: Path) -> None:
    with pytest.raises(TokenizerNotFoundError) as caught:
        find_tokenizer(tmp_path / "t5.pth")
    assert str(caught.value).count(str(tmp_path)) >= 10 and "tokenizer_path=FOLDER" in str(caught.value)
    with pytest.raises(TokenizerNotFoundError, match="nowhere: the text encoder was not loaded from a file"):
        find_tokenizer(None)
