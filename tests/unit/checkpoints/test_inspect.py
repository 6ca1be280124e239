from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.cli.inspect import inspect_paths, run_inspect, to_json, to_text
from diffsynth.errors import CheckpointNotFoundError, MissingShardError
from tests.unit.checkpoints.weights import expected, manifests, toy_dit, write_sparse, write_sparse_pth

REPOSITORY = Path(__file__).parents[3]


def test_json_has_one_object_per_network(tmp_path: Path) -> None:
    write_sparse(tmp_path / "vace.safetensors", manifests()["wan2.1_vace_1.3b"])
    dit, vace = json.loads(to_json(inspect_paths(str(tmp_path / "vace.safetensors"))))
    assert (dit["name"], dit["family"], vace["name"]) == ("wan_video_dit", "vace", "wan_video_vace")
    assert dit["path"] == str(tmp_path / "vace.safetensors") and dit["layout"] == "official"
    config = {"dim": 1536, "in_dim": 16, "out_dim": 16, "ffn_dim": 8960, "num_layers": 30, "num_heads": 12}
    assert {key: dit["config"][key] for key in config} == config
    assert dit["parameters"] + vace["parameters"] == expected()["wan2.1_vace_1.3b"]["parameters"]
    assert dit["dtypes"] == {"BF16": 825} and dit["left_over"] == []
    assert any("num_heads is 12" in sentence for sentence in dit["assumed"])


def test_text_tells_all_that_a_user_needs(tmp_path: Path) -> None:
    shapes = {**manifests()["wan2.1_t2v_14b"], "my_extra.weight": (3, 3)}
    folder = tmp_path / "high_noise_model"
    folder.mkdir()
    write_sparse(folder / "model.safetensors", {f"model.diffusion_model.{n}": s for n, s in shapes.items()})
    text = to_text(inspect_paths(tmp_path))
    for part in ("wan_video_dit", "t2v", "high-noise expert", "comfyui", "dim 5120", "num_heads 40",
    "14,288,491,584",
                 "26.61 GiB", "BF16", "assumed", "heads of 128", "left over", "my_extra.weight"):  # fmt: skip
        assert part in text, part


def test_a_missing_key_is_said_beside_what_is_known(tmp_path: Path) -> None:
    save_file(toy_dit().state_dict(), tmp_path / "dit.safetensors")
    reports = inspect_paths(tmp_path)
    assert "dim 96" in to_text(reports) and "num_heads is missing" in to_text(reports)
    (network,) = json.loads(to_json(reports))
    assert network["config"]["num_heads"] is None and "num_heads" in network["missing"][0]


def test_an_unknown_file_shows_its_contents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {f"layers.{i}.weight": torch.zeros(3, 2) for i in range(40)}
    save_file(weights, tmp_path / "what.safetensors")
    save_file(toy_dit().state_dict(), tmp_path / "dit.safetensors")
    with pytest.raises(SystemExit, match="1"):
        run_inspect([str(tmp_path)], as_json=False)
    text = capsys.readouterr().out
    assert "match no known model" in text and "layers.*.weight F32 [3, 2] x 40" in text
    assert "wan_video_dit" in text
    with pytest.raises(SystemExit):
        run_inspect([str(tmp_path)], as_json=True)
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 1 and "match no known model" in captured.err


def test_a_damaged_file_does_not_hide_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    save_file(toy_dit().state_dict(), tmp_path / "dit.safetensors")
    damaged, dit = inspect_paths([str(tmp_path / "a.safetensors"), str(tmp_path / "dit.safetensors")])
    assert "is empty" in damaged.error and damaged.matches == [] and len(dit.matches) == 1


def test_paths_that_do_not_exist_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        run_inspect([str(tmp_path / "no.safetensors")], as_json=True)
    path = write_sparse(tmp_path / "m-00001-of-00002.safetensors", {"w": (1,)})
    with pytest.raises(MissingShardError, match="1 of 2 missing"):
        run_inspect([str(path)], as_json=False)


SCRIPT = """
import json, sys
from pathlib import Path
from diffsynth.cli.inspect import run_inspect
run_inspect(sys.argv[1:], as_json=True)
heavy = {"torch", "numpy", "safetensors", "pydantic", "transformers"} & set(sys.modules)
status = Path("/proc/self/status").read_text().splitlines()
peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
sys.stderr.write(json.dumps([sorted(heavy), peak_kib]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_28_gb_checkpoint_is_looked_at_without_torch_and_without_memory(tmp_path: Path) -> None:
    dit = write_sparse(tmp_path / "dit.safetensors", manifests()["wan2.1_t2v_14b"])
    text_encoder = write_sparse_pth(tmp_path / "t5.pth", manifests()["umt5_xxl_enc_bf16"])
    assert dit.stat().st_size > 28e9 and text_encoder.stat().st_size > 11e9
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(dit), str(text_encoder)],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    networks = json.loads(done.stdout)
    assert [network["name"] for network in networks] == ["wan_video_dit", "wan_video_text_encoder"]
    assert [network["parameters"] for network in networks] == [14_288_491_584, 5_680_910_336]
    heavy, peak_kib = json.loads(done.stderr)
    assert heavy == [] and peak_kib < 100 << 10
