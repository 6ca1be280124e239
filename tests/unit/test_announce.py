"""What a load found is seen by a script that sets up no logging, and never twice."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.models.model_manager import ModelManager

logger = logging.getLogger("diffsynth")
NAMES = ("wan_video_dit", "wan_video_text_encoder", "wan_video_vae")


@pytest.fixture
def no_handlers() -> Iterator[Callable[[], None]]:
    """Call it in a test: pytest puts its handlers on the root logger just before."""
    root, level, found = logging.getLogger(), logging.getLogger().level, list[logging.Handler]()

    def take_away() -> None:
        found.extend(root.handlers)
        root.handlers.clear()

    yield take_away
    root.handlers[:] = found
    root.setLevel(level)
    logger.setLevel(logging.NOTSET)
    logging.disable(logging.NOTSET)


def load(toy_folder: Path) -> ModelManager:
    return ModelManager(torch.float32, "cpu").load_models(toy_folder)


def write_lora(folder: Path) -> Path:
    """Factors for one layer of the toy DiT."""
    name = "diffusion_model.blocks.0.self_attn.q.lora_{}.weight"
    path = folder / "style.safetensors"
    save_file({name.format("A"): torch.ones(4, 48), name.format("B"): torch.ones(48, 4)}, path)
    return path


def test_a_plain_script_sees_one_line_for_each_network_and_lora(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_handlers: Callable[[], None]
) -> None:
    no_handlers()
    load(toy_folder).load_lora(write_lora(tmp_path))
    *loaded, lora = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in loaded] == list(NAMES)
    assert "style.safetensors: LoRA 'style' (comfy, rank 4) fused into 1 layers" in lora


@pytest.mark.parametrize(
    "be_quiet",
    [
        pytest.param(lambda: logging.disable(logging.CRITICAL), id="logging.disable"),
        pytest.param(lambda: logger.setLevel(logging.ERROR), id="a-level"),
        pytest.param(lambda: None, id="DIFFSYNTH_QUIET"),
    ],
)
def test_a_script_can_ask_for_silence(
    be_quiet: Callable[[], None], request: pytest.FixtureRequest, toy_folder: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_handlers: Callable[[], None],
) -> None:  # fmt: skip
    no_handlers()
    monkeypatch.setenv("DIFFSYNTH_QUIET", str(int("DIFFSYNTH_QUIET" in request.node.name)))
    be_quiet()
    load(toy_folder)
    assert capsys.readouterr().err == ""


def test_a_program_that_logs_gets_each_line_once_even_if_it_begins_later(
    toy_folder: Path, capsys: pytest.CaptureFixture[str], no_handlers: Callable[[], None]
) -> None:
    no_handlers()
    load(toy_folder)
    assert capsys.readouterr().err.count("Loaded ") == len(NAMES)
    written = io.StringIO()
    logging.basicConfig(level=logging.INFO, stream=written)
    load(toy_folder)
    assert written.getvalue().count("Loaded ") == len(NAMES)
    assert capsys.readouterr().err == ""


def test_pytest_catches_the_lines(
    toy_folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, logger="diffsynth")
    load(toy_folder)
    assert caplog.text.count("Loaded ") == len(NAMES)
    assert capsys.readouterr().err == ""
