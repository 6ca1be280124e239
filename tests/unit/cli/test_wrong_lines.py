"""Wrong lines of every command: one message that names the value and what to do, and never a traceback."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffsynth import save_image, save_video
from diffsynth.tiny import tiny_folder
from tests.unit.cli.running import Shell


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are not what a line takes them for."""
    folder = tmp_path_factory.mktemp("wrong")
    save_video([Image.new("RGB", (32, 32))] * 5, folder / "in.mp4")
    save_image(Image.new("RGB", (32, 32)), folder / "cat.png")
    (folder / "tiny").symlink_to(tiny_folder())
    (folder / "empty").mkdir()
    (folder / "data").mkdir()
    (folder / "data" / "metadata.csv").write_text("file_name,text\nno.mp4,a\n")
    texts = {
        "text.txt": "hello", "fake.mp4": "x", "fake.png": "x", "none.safetensors": "", "bad.yaml": "a: [1",
        "list.yaml": "- 1", "bad.json": "{", "boxes.json": '[{"0": [1, 2, 3]}]',
        "evil.pth": "cos\nsystem\n(S'id'\ntR.",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    save_file({"latents": torch.zeros(1, 16, 2, 4, 4)}, folder / "l.latents.safetensors")
    save_file({"latents": torch.zeros(4, 4)}, folder / "flat.safetensors")
    save_file({"a": torch.zeros(2)}, folder / "other.safetensors")
    save_file({"diffusion_model.blocks.0.q.lora_A.weight": torch.zeros(2, 8)}, folder / "half.safetensors")
    return folder


# a line, and words of its message; G is a generation of one step and one frame
LINES = [
    ("G --seed 100000000000000000000000", "seed is 100000000000000000000000; give 0 to"),
    ("G --seed 1.5", "--seed"),
    ("G --device foo", "device is 'foo', which names no device; give cpu, cuda"),
    ("G --device ''", "device is '', which names no device"),
    ("G --device cpu:foo", "device is 'cpu:foo'"),
    ("G --device xpu", "device is 'xpu', but torch finds none here"),
    ("G --device meta", "--device is meta, which computes nothing"),
    ("G --steps 0", "num_inference_steps is 0"),
    ("G --width 99999999999999999999", "MiB are free"),
    ("G --num-videos-per-prompt 99999999999", "num_videos_per_prompt is 99999999999; give"),
    ("G --cfg-scale nan", "cfg_scale is nan"),
    ("G --sigma-shift inf", "sigma_shift is inf"),
    ("G --vram foo", "--vram is 'foo'; give GiB"),
    ("G --tile-size 30,52", "--tile-size' requires 2 arguments"),
    ("G --model nowhere", "nowhere does not exist"),
    ("G --model https://huggingface.co/a/b", "is an address, and nothing is read from addresses"),
    ("G --model https:/huggingface.co/a/b", "Wan-AI/Wan2.1-T2V-1.3B, with --download"),
    ("G --model Wan-AI/Nope", "allow the download"),
    ("G --model ''", "No path was given"),
    ("G --model text.txt", "neither a torch file nor safetensors"),
    ("G --model evil.pth", "neither a torch file nor safetensors"),
    ("G --model none.safetensors", "is empty (0 bytes)"),
    ("G --model empty", "holds no weights"),
    ("G --model other.safetensors", "match no known model"),
    ("G --lora nowhere.safetensors", "nowhere.safetensors is no file; give FILE"),
    ("G --dtype int8", "'int8' is not one of"),
    ("G --input-video fake.mp4", "is not a video that can be read"),
    ("G --input-video https://host/a.mp4", "is an address, and nothing is read from addresses"),
    ("G --input-video empty", "holds no picture"),
    ("G --input-image fake.png", "cannot be read as a picture"),
    ("G --denoising-strength nan", "denoising_strength is nan"),
    ("generate a --out o.xyz", "tells no known format"),
    ("generate a --out .", "is a folder; give the name of a file"),
    ("generate a --out /proc/x.mp4", "cannot be written"),
    ("generate a --out o.mp4 --fps nan", "fps is nan"),
    ("generate a --out o.mp4 --crf 999", "crf is 999.0; give 0 (best) to 51"),
    ("generate a --out o.mp4 --codec foo", "codec 'foo' is not in this build"),
    ("generate a b", "unexpected extra argument"),
    ("generate", "There is no prompt"),
    ("decode nowhere.safetensors", "does not exist"),
    ("decode flat.safetensors", "not latents (B, C, T, h, w)"),
    ("decode in.mp4", "neither a torch file nor safetensors"),
    ("decode empty", "empty"),
    ("decode l.latents.safetensors", "does not tell where the VAE is"),
    ("decode l.latents.safetensors --vae text.txt", "neither a torch file nor safetensors"),
    ("decode l.latents.safetensors --vae tiny --device foo", "device is 'foo'"),
    ("refine", "--from is missing"),
    ("refine --from in.mp4", "does not tell how it was made"),
    ("refine --from text.txt", "text.txt is not a video that can be read"),
    ("refine --from empty", "does not exist"),
    ("generate --task foo", "'foo' is not one of"),
    ("generate --task t2v-14B --prompt a", "needs --ckpt_dir FOLDER"),
    ("generate a --task vace-1.3B --ckpt_dir tiny --src_video fake.mp4", "is not a video that can be read"),
    ("plan nowhere", "does not exist"),
    ("plan text.txt", "None of these is a network"),
    ("plan tiny --vram nan", "--vram is nan; give GiB above 0"),
    ("plan tiny --tflops 0", "tflops is 0"),
    ("plan tiny --ring-gbs nan", "ring_gbs is nan"),
    ("plan tiny --num-persistent -5", "--num-persistent is -5; give 0"),
    ("inspect nowhere", "does not exist"),
    ("inspect ''", "No path was given"),
    ("inspect text.txt", ""),
    ("inspect '*.nothing'", "finds no weights"),
    ("doctor foo", "unexpected extra argument"),
    ("preprocess in.mp4 o.mp4", "--task"),
    ("preprocess fake.mp4 o.mp4 --task grey", "is not a video that can be read"),
    ("preprocess in.mp4 o.png --task grey", "has 5 frames; name a video"),
    ("preprocess cat.png o.mp4 --task grey", "is a picture; name a picture"),
    ("preprocess in.mp4 o.mp4 --task grey --fps 0", "fps is 0.0; give frames per second above 0"),
    ("preprocess in.mp4 o.mp4 --task layout", "needs --boxes FILE"),
    ("preprocess in.mp4 o.mp4 --task layout --boxes bad.json", "holds no boxes"),
    ("preprocess in.mp4 o.mp4 --task layout --boxes boxes.json", "holds no boxes"),
    ("preprocess in.mp4 o.mp4 --task layout --boxes in.mp4", "holds no boxes"),
    ("preprocess in.mp4 o.mp4 --task depth --device foo", "--device is 'foo', which names no device"),
    ("preprocess in.mp4 o.mp4 --task depth", "needs model"),
    ("lora inspect nowhere", "does not exist"),
    ("lora inspect other.safetensors", "other.safetensors"),
    ("lora inspect tiny", "tiny"),
    ("lora convert half.safetensors --out o.safetensors", "the file is incomplete"),
    ("lora convert half.safetensors --out o.txt", "tells no known format"),
    ("lora merge tiny --lora nowhere --out o.safetensors", "nowhere"),
    ("lora extract tiny tiny --rank 0 --out o.safetensors", ""),
    ("dataset check nowhere", "does not exist"),
    ("dataset check empty", "empty"),
    ("dataset check data", "no.mp4"),
    ("dataset check data --size foo", "--size is 'foo'; give HEIGHTxWIDTH"),
    ("dataset check data --size 0x0", "0"),
    ("dataset check data --fps nan", "nan"),
    ("dataset check data --aspect 1:0", "1:0"),
    ("dataset check data --model foo", "--model is 'foo'; give"),
    ("dataset check data --batch 0", "0"),
    ("train nowhere.yaml", "nowhere.yaml does not exist"),
    ("train bad.yaml", "bad.yaml"),
    ("train list.yaml", "list.yaml"),
    ("train in.mp4", "in.mp4"),
    ("train --foo 5", "foo"),
    ("train --run.steps", "run.steps is"),
    ("foo", "No such command 'foo'"),
]  # fmt: skip


# what only the loaded model can tell; the tiny Wan is loaded for each
LATE = [
    ("G --height 0", "height is 0"),
    ("G --vram nan", "vram_limit is nan"),
    ("G --ram -1", "ram_limit is -1"),
    ("G --attention foo", "'foo' is no kernel"),
    ("G --preset foo", "preset is 'foo'; known"),
    ("G --tile-size 0 0 --tiled", "tile_size is (0, 0)"),
    ("G --dit foo", "--dit says something of --model, which was not given"),
    ("G --lora text.txt", "neither a torch file nor safetensors"),
    ("G --lora half.safetensors", "the file is incomplete"),
    ("G --tokenizer-path nowhere", "needs its tokenizer"),
    ("G --input-image cat.png", "reads no picture"),
    ("G --control-video in.mp4", "no loaded model reads it"),
    ("G --cache-text text.txt", "which is a file; give a folder"),
]  # fmt: skip
ALL = [
    *(pytest.param(*each, id=each[0]) for each in (*LINES, *LATE[:3])),
    *(pytest.param(*each, id=each[0], marks=pytest.mark.slow) for each in LATE[3:]),
]


@pytest.mark.parametrize(("line", "told"), ALL)
def test_a_wrong_line_is_one_message(
    line: str, told: str, folder: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    if words[0] == "G":
        words = [
            "generate",
            "a red circle",
            "--steps",
            "1",
            "--num-frames",
            "1",
            "--out",
            "o.png",
            *words[1:],
        ]
    ran = shell(*words)
    said = " ".join((ran.out + ran.err).replace("│", " ").split())
    assert ran.status in (1, 2), said
    assert told in said, said
    assert "Traceback" not in said and "fault of diffsynth" not in said
    assert not list(tmp_path.glob("o.*")), "nothing is left"


def test_latents_are_told_with_the_command_that_reads_them(folder: Path, shell: Shell) -> None:
    ran = shell("inspect", folder / "l.latents.safetensors")
    assert ran.status == 1 and f"diffsynth decode {folder}/l.latents.safetensors" in ran.out
    told = shell("inspect", folder / "other.safetensors").out
    assert "match no known model" in told and "diffsynth inspect" not in told, (
        "no advice to do the same again"
    )
