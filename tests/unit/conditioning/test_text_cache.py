"""Prompts that were encoded once are read from the disk, and only for the encoder that made them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffsynth.conditioning.conditioner import Geometry
from diffsynth.conditioning.text import TextConditioner, TextInputs
from diffsynth.conditioning.text_cache import TextCache, fingerprint
from diffsynth.conditioning.tokenizer import Tokenizer
from diffsynth.errors import ArgumentError, MissingModelError, OutputPathError, UnusedInputError
from diffsynth.pipelines.components import PipelineComponents
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.tiny import tiny_folder
from tests.toys import TOY_FILES
from tests.unit.pipelines.counting import calls_of

VOCABULARY_FILE = tiny_folder() / "google" / "umt5-xxl" / "spiece.model"
VOCABULARY = Tokenizer(VOCABULARY_FILE)
GEOMETRY = Geometry(
    num_videos=1, num_frames=5, height=16, width=16, latent_channels=16, latent_frames=2, latent_height=2,
    latent_width=2,
)  # fmt: skip


class Table(nn.Module):
    """An encoder of one table; ``seen`` counts its texts."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        rows = torch.randn(640, 4, generator=torch.Generator().manual_seed(seed))
        self.rows = nn.Parameter(rows.to(dtype))
        self.seen = 0

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        self.seen += 1
        return self.rows[ids]


def parts_of(encoder: nn.Module | None) -> Any:
    parts = PipelineComponents(device=torch.device("cpu"), dtype=torch.float32)
    parts.text_encoder = encoder  # type: ignore[assignment]
    parts.tokenizer = None if encoder is None else VOCABULARY
    return parts


def encode(parts: Any, **inputs: Any) -> tuple[Tensor, Tensor | None]:
    given, conditioner = TextInputs(**inputs), TextConditioner()
    assert conditioner.applies(given, parts)
    text = conditioner.encode(given, GEOMETRY, parts).text
    assert text is not None
    return text


def needs_encoder(parts: Any, **inputs: Any) -> bool:
    return TextConditioner().needs_encoder(TextInputs(**inputs), parts)


def test_each_distinct_text_is_encoded_once_and_then_read(tmp_path: Path) -> None:
    encoder = Table()
    parts, inputs = parts_of(encoder), {"prompt": "a  red circle", "negative_prompt": "blurry"}
    plain = encode(parts, **inputs)
    assert encoder.seen == 2 and needs_encoder(parts, **inputs)
    assert needs_encoder(parts, **inputs, cache_text=tmp_path)
    first = encode(parts, **inputs, cache_text=tmp_path)
    assert encoder.seen == 4 and not needs_encoder(parts, **inputs, cache_text=tmp_path)
    again = encode(parts, prompt="a red circle ", negative_prompt="blurry", cache_text=str(tmp_path))
    assert encoder.seen == 4, "cleaned texts are equal"
    for positive, negative in (first, again):
        assert torch.equal(positive, plain[0]) and positive.dtype == torch.bfloat16
        assert negative is not None and plain[1] is not None and torch.equal(negative, plain[1])
    assert len(list(tmp_path.iterdir())) == 2
    encode(parts, prompt="a red circle", negative_prompt="grey", cache_text=tmp_path)
    assert encoder.seen == 5, "only what is new is encoded"


def test_given_embeddings_need_no_encoder() -> None:
    rows = torch.zeros(1, 3, 4)
    assert not needs_encoder(parts_of(None), prompt_embeds=rows, cfg_scale=1.0)
    assert needs_encoder(parts_of(None), prompt_embeds=rows, cfg_scale=2.0)


OTHERS = [
    pytest.param(Table(seed=1), id="other weights"),
    pytest.param(Table(dtype=torch.float32), id="other dtype"),
]


@pytest.mark.parametrize("other", OTHERS)
def test_entries_of_another_encoder_are_not_read(tmp_path: Path, other: Table) -> None:
    inputs = {"prompt": "red", "cfg_scale": 1.0, "cache_text": tmp_path}
    encode(parts_of(Table()), **inputs)
    assert needs_encoder(parts_of(other), **inputs)
    assert not needs_encoder(parts_of(Table()), **inputs), "an equal encoder is the same"
    encode(parts_of(other), **inputs)
    with pytest.raises(ArgumentError, match="'red' from 2 text encoders; load the one that is meant"):
        encode(parts_of(None), **inputs)


def test_another_tokenizer_makes_another_entry(tmp_path: Path) -> None:
    inputs = {"prompt": "a red circle moves right", "cfg_scale": 1.0, "cache_text": tmp_path}
    encode(parts_of(Table()), **inputs)
    short = replace(parts_of(Table()), tokenizer=Tokenizer(VOCABULARY_FILE, max_tokens=3))
    assert needs_encoder(short, **inputs)


@pytest.mark.parametrize("place", ["start", "middle"])
def test_a_fingerprint_looks_into_the_weights(place: str) -> None:
    encoder, trained = Table(), Table()
    with torch.no_grad():
        trained.rows[0 if place == "start" else 320, 0] += 1
    assert fingerprint(encoder) == fingerprint(Table()) != fingerprint(trained)


def test_without_encoder_the_only_entry_of_a_text_is_taken_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = {"prompt": "red", "cfg_scale": 1.0, "cache_text": tmp_path}
    made = encode(parts_of(Table()), **inputs)
    with caplog.at_level(logging.INFO, "diffsynth"):
        read = encode(parts_of(None), **inputs)
    assert torch.equal(read[0], made[0]) and "features of 'red' are taken as cached" in caplog.text
    with pytest.raises(MissingModelError, match="lacks a text of this call"):
        encode(parts_of(None), **{**inputs, "prompt": "blue"})


@pytest.mark.parametrize("kind", ["cut off", "changed", "another text"])
def test_damaged_entries_are_made_again_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    inputs = {"prompt": "red", "cfg_scale": 1.0, "cache_text": tmp_path}
    made = encode(parts_of(Table()), **inputs)
    [file] = tmp_path.iterdir()
    data = file.read_bytes()
    damaged = {
        "cut off": data[:-3],
        "changed": data[:-1] + bytes([data[-1] ^ 1]),
        "another text": data.replace(b'"red"', b'"rad"'),
    }[kind]
    file.write_bytes(damaged)
    encoder = Table()
    again = encode(parts_of(encoder), **inputs)
    assert torch.equal(again[0], made[0]) and encoder.seen == 1
    assert caplog.text.count("A cached prompt is damaged and is made again") == 1
    assert not needs_encoder(parts_of(Table()), **inputs)


def test_folders_that_cannot_be_used_are_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, kind, words in (
        (tmp_path / "file", OutputPathError, "which is a file; give a folder"),
        ("/proc/none", OutputPathError, "cannot be written"),
        (5, ArgumentError, "cache_text is 5; give the path of a folder"),
        ("", ArgumentError, "cache_text is ''"),
    ):
        with pytest.raises(kind, match=words):
            TextConditioner().applies(TextInputs(prompt="red", cache_text=folder), parts_of(Table()))
    with pytest.raises(UnusedInputError, match="there is no text to encode"):
        given = TextInputs(prompt_embeds=torch.zeros(1, 3, 4), cfg_scale=1.0, cache_text=tmp_path)
        TextConditioner().applies(given, parts_of(Table()))


def test_an_entry_that_cannot_be_written_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputPathError, match="No space left"):
        TextCache(tmp_path, parts_of(Table())).store("red", torch.zeros(2, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_with_all_prompts_kept_leaves_its_encoder_at_rest(
    toy_folder: Path, tmp_path: Path
) -> None:
    pipe = WanVideoPipeline.from_pretrained(toy_folder, torch_dtype=torch.float32, device="cpu")
    arguments = {"seed": 0, "output_type": "latent"}
    plain = pipe("a red circle", "blurry", **arguments)
    kept = pipe("a red circle", "blurry", cache_text=tmp_path, **arguments)
    with calls_of(pipe.text_encoder) as calls:
        again = pipe("a red circle", "blurry", cache_text=tmp_path, **arguments)
    assert calls == [] and torch.equal(plain, kept) and torch.equal(plain, again)
    assert "cache_text" not in pipe.last_settings
    files = [toy_folder / TOY_FILES[part] for part in ("dit", "vae")]
    bare = WanVideoPipeline.from_pretrained(files, torch_dtype=torch.float32, device="cpu")
    assert torch.equal(bare("a red circle", "blurry", cache_text=tmp_path, **arguments), plain)


def test_the_encoder_comes_to_the_device_only_when_it_is_asked(toy_folder: Path, tmp_path: Path) -> None:
    pipe = WanVideoPipeline.from_pretrained(toy_folder, torch_dtype=torch.float32, device="cpu")
    phases: list[tuple[str, ...]] = []
    use = pipe._residency.use
    pipe._residency.use = lambda *names: (phases.append(names), use(*names))[1]  # type: ignore[method-assign]
    for _ in range(2):
        pipe("a red circle", seed=0, cache_text=tmp_path, output_type="latent")
    assert [names for names in phases if "text_encoder" in names] == [("text_encoder",)]
