"""``diffsynth lora``: look, translate, merge, extract."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffsynth.models.model_manager import ModelManager
from tests.toys import TOY_DIT, write_toy_dit
from tests.unit.cli.running import Shell
from tests.unit.lora.files import comfy_file, drawn, pair, write

D, H = TOY_DIT.dim, TOY_DIT.ffn_dim
LAYERS = {"blocks.0.self_attn.q": (D, D), "blocks.1.ffn.0": (H, D)}


def weights(path: Path, lora: Path | None = None, strength: float = 1.0) -> dict[str, Tensor]:
    manager = ModelManager(torch.float32, "cpu").load_models([path])
    if lora is not None:
        manager.load_lora(lora, strength)
    return {name: t.clone() for name, t in manager.model[0].state_dict().items()}


def test_inspect_tells_what_is_inside(shell: Shell, tmp_path: Path) -> None:
    keys = load_file(comfy_file(tmp_path / "a.safetensors", LAYERS))
    keys |= {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(2.0), "strange.weight": drawn(2)}
    file = write(tmp_path / "style_low_noise.safetensors", keys, {"ss_epoch": "3"})
    [told] = json.loads(shell("lora", "inspect", file, "--json").out)
    assert (told["dialect"], told["expert"], told["layers"], told["keys"]) == ("comfy", "low", 2, 6)
    assert told["kinds"] == {"rank 4": 2} and told["scales"] == {"0.5": 1, "1": 1}
    text = shell("lora", "inspect", file).out
    for part in ("comfy", "low-noise", "rank 4 x 2", "strange.weight", "ss_epoch = 3"):
        assert part in text


def test_convert_there_and_back(shell: Shell, tmp_path: Path) -> None:
    file = comfy_file(tmp_path / "a.safetensors", LAYERS)
    for dialect in ("kohya", "diffusers", "peft"):
        there, back = tmp_path / f"{dialect}.safetensors", tmp_path / f"{dialect}_back.safetensors"
        assert shell("lora", "convert", file, "--out", there, "--to", dialect).status == 0
        assert shell("lora", "convert", there, "--out", back).status == 0
        old, new = load_file(file), load_file(back)
        assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
        assert {name for name in new if name not in old} <= {f"diffusion_model.{n}.alpha" for n in LAYERS}


def test_convert_refuses_what_it_cannot_write(shell: Shell, tmp_path: Path) -> None:
    name = "diffusion_model.blocks.1.ffn.0"
    file = write(
        tmp_path / "lokr.safetensors", {f"{name}.lokr_w1": drawn(8, 6), f"{name}.lokr_w2": drawn(8, 8)}
    )
    out = tmp_path / "out.safetensors"
    ran = shell("lora", "convert", file, "--out", out, "--to", "peft")
    assert ran.status == 1 and "blocks.1.ffn.0 (lokr_w1, lokr_w2)" in ran.err and "--svd RANK" in ran.err
    assert shell("lora", "convert", file, "--out", out, "--to", "peft", "--svd", "48").status == 0
    assert {tuple(t.shape) for t in load_file(out).values()} == {(48, D), (H, 48)}
    down, up = pair(D, D)
    keys = {"blocks.0.ffn.0.lora_A.weight": down, "blocks.0.ffn.0.lora_B.weight": up, "x.weight": down}
    odd = write(tmp_path / "odd.safetensors", keys)
    ran = shell("lora", "convert", odd, "--out", tmp_path / "no.safetensors")
    assert ran.status == 1 and "x.weight" in ran.err
    assert shell("lora", "convert", odd, "--out", tmp_path / "no.txt").status == 1


def test_merge_writes_the_fused_model(shell: Shell, tmp_path: Path) -> None:
    base = write_toy_dit(tmp_path / "dit.safetensors")
    loras = [comfy_file(tmp_path / f"{n}.safetensors", LAYERS) for n in "ab"]
    out = tmp_path / "merged.safetensors"
    ran = shell("lora", "merge", base, "--lora", loras[0], "--weight", "0.5", "--out", out)
    assert ran.status == 0 and "warning" not in ran.err
    merged, expected = weights(out), weights(base, loras[0], 0.5)
    assert merged.keys() == expected.keys() and all(torch.equal(merged[n], expected[n]) for n in merged)
    twice = ("lora", "merge", base, "--lora", loras[0], "--lora", loras[1], "--out", out)
    assert shell(*twice).status == 1 and shell(*twice, "--overwrite").status == 0
    ran = shell("lora", "merge", base, "--lora", loras[0], "--lora", loras[1], "--weight", "1", "--out", out)
    assert ran.status == 1 and "1 times for 2 LoRAs" in ran.err
    other = write_toy_dit(tmp_path / "other.safetensors", config=replace(TOY_DIT, dim=64))
    ran = shell("lora", "merge", other, "--lora", loras[0], "--out", tmp_path / "no.safetensors")
    assert ran.status == 1 and "another size" in ran.err and not (tmp_path / "no.safetensors").exists()


def test_extract_finds_the_lora_of_a_merged_model(shell: Shell, tmp_path: Path) -> None:
    base = write_toy_dit(tmp_path / "dit.safetensors")
    keys = load_file(comfy_file(tmp_path / "a.safetensors", LAYERS))
    keys |= {
        "diffusion_model.blocks.0.ffn.0.diff_b": drawn(H),
        "diffusion_model.blocks.1.diff_m": drawn(1, 6, D),
    }
    lora = write(tmp_path / "b.safetensors", keys)
    merged, found = tmp_path / "merged.safetensors", tmp_path / "found.safetensors"
    assert shell("lora", "merge", base, "--lora", lora, "--out", merged).status == 0
    ran = shell("lora", "extract", merged, base, "--rank", "4", "--out", found)
    assert ran.status == 0 and "4 layers, rank 4" in ran.out
    assert {name for name in load_file(found) if not name.endswith("alpha")} == set(keys)
    again, expected = weights(base, found), weights(merged)
    assert all(torch.allclose(again[n], expected[n], atol=1e-5) for n in expected)
    ran = shell("lora", "extract", base, base, "--out", found, "--overwrite")
    assert ran.status == 1 and "same numbers" in ran.err
    ran = shell("lora", "extract", merged, base, "--out", found, "--to", "diffusers", "--overwrite")
    assert ran.status == 1 and "(diff" in ran.err


def test_the_largest_directions_of_a_large_matrix_are_found() -> None:
    from diffsynth.lora.extract import low_rank

    left, right = torch.linalg.qr(torch.randn(1100, 40)).Q, torch.linalg.qr(torch.randn(1200, 40)).Q
    values = torch.linspace(40, 1, 40)
    matrix = (left * values) @ right.T
    down, up = low_rank(matrix, 24)
    assert down.shape == (24, 1200) and up.shape == (1100, 24)
    best = values[24:].norm()  # Eckart and Young: no matrix of this rank is nearer
    assert (matrix - up @ down).norm() <= 1.001 * best
    assert all(torch.equal(*pair) for pair in zip(low_rank(matrix, 24), (down, up), strict=True))


def test_help_costs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['diffsynth', 'lora', 'merge', '--help']\n"
        "from diffsynth.cli.app import main\n"
        "try: main()\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0


@pytest.mark.parametrize("command", ["inspect", "convert", "merge", "extract"])
def test_usage_errors_end_with_2(command: str, shell: Shell) -> None:
    assert shell("lora", command, "--nonsense").status == 2


def test_what_a_lora_command_does_not_read_is_refused(shell: Shell, tmp_path: Path) -> None:
    lora = comfy_file(tmp_path / "style.safetensors", {"blocks.0.self_attn.q": (48, 48)})
    high = comfy_file(tmp_path / "style_high_noise.safetensors", {"blocks.0.self_attn.q": (48, 48)})
    out = tmp_path / "out.safetensors"
    for given, words in (
        (
            (lora, "--network", "high"),
            "style.safetensors is one LoRA, no word of an expert in its name or keys",
        ),
        ((high, "--network", "low"), "style_high_noise.safetensors is one LoRA, for high noise"),
        ((lora, "--svd", 0), "--svd is 0; give a rank of 1 or more"),
    ):
        ran = shell("lora", "convert", *given, "--out", out)
        assert ran.status == 1 and words in ran.err and not out.exists()
    ran = shell("lora", "merge", lora, "--lora", lora, "--weight", "nan", "--out", out)
    assert ran.status == 1 and "--weight is nan" in ran.err
    assert shell("lora", "convert", high, "--network", "high", "--out", out).status == 0
