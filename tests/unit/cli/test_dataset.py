"""``diffsynth dataset check``: what a user sees of a dataset before training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import diffsynth
from tests.pictures import numbered, smooth
from tests.unit.cli.running import Shell

SMALL = ("--size", "48x64", "--num-frames", "5")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    train = tmp_path / "data" / "train"
    diffsynth.save_video(numbered(9), train / "a.mp4", fps=16)
    diffsynth.save_video(numbered(3), train / "short.mp4", fps=16)
    diffsynth.save_image(smooth(), train / "b.png")
    lines = ("file_name,text", "a.mp4,bars", "short.mp4,few bars", 'b.png,"colours, mixed"')
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(lines))
    return tmp_path / "data"


def test_report_list_and_sheet(shell: Shell, data: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    ran = shell("dataset", "check", data, *SMALL, "--sheet", sheet, "--batch", 2, "--vram", 1)
    assert ran.status == 0, ran.err
    assert "3 files listed, 2 used, 1 dropped; 2 clips (1 of one frame)" in ran.out
    assert "short.mp4: too short: 3 frames, the shortest clip takes 5" in ran.out
    assert "bucket 5 frames of 64x48 holds 1 clips and a step takes 2" in ran.out
    assert "is predicted to need 3." in ran.out and "there are 1 GB: it will not fit" in ran.out
    assert sheet.stat().st_size > 1000 and (data / "diffsynth_dropped.txt").read_text().startswith(str(data))


def test_json_is_one_object(shell: Shell, data: Path, tmp_path: Path) -> None:
    ran = shell("dataset", "check", data, *SMALL, "--json", "--v1", "--lists", tmp_path / "lists")
    told = json.loads(ran.out)
    assert (told["files"], told["clips"], len(told["dropped"])) == (3, 2, 1)
    assert told["lists"] == [str(tmp_path / "lists" / "diffsynth_dropped.txt")]
    assert told["notes"] == [{"file": str(data / "train" / "a.mp4"), "text": "4 of 9 frames unused"}]


def test_sizes_of_a_model_come_from_its_file(shell: Shell, data: Path) -> None:
    dit = Path(diffsynth.__file__).parent / "tiny" / "weights" / "diffusion_pytorch_model.safetensors"
    ran = shell("dataset", "check", data, *SMALL, "--json", "--model", dit)
    assert ran.status == 0, ran.err
    assert json.loads(ran.out)["buckets"][1]["memory_gb"] < 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--num-frames", 147), "147 -> 145 or 149"),
        (("--size", "480x840"), "give 832 or 848"),
        (("--size", "480"), "HEIGHTxWIDTH"),
        (("--fps", "quick"), "give a number, or native"),
        (("--v1", "--fps", "16"), "--v1 means"),
        (("--model", "7B"), "1.3B, 14B, 5B, or the path of a DiT"),
        ((*SMALL, "--strict"), "1 of 3 files cannot be used, and strict refuses that"),
        ((), "none of 3 files gives a usable clip"),
        ((*SMALL, "--batch", 0), "batch is 0"),
    ],
)
def test_mistakes_are_one_clear_error(
    shell: Shell, data: Path, arguments: tuple[object, ...], says: str
) -> None:
    if not arguments:
        (data / "train" / "b.png").unlink()
    ran = shell("dataset", "check", data, *arguments)
    assert ran.status == 1 and ran.err.startswith("error: ") and says in ran.err


def test_a_sheet_does_not_become_training_data(shell: Shell, data: Path) -> None:
    ran = shell("dataset", "check", data, *SMALL, "--sheet", data / "sheet.png")
    assert ran.status == 1 and "write it elsewhere" in ran.err


def test_undecodable_clips_are_found_by_decoding(shell: Shell, data: Path) -> None:
    file = data / "train" / "b.png"
    file.write_bytes(file.read_bytes()[:100])  # of 169
    ran = shell("dataset", "check", data, *SMALL, "--decode")
    assert ran.status == 0 and "b.png cannot be read as a picture" in ran.out
