"""Write random checkpoints of the released networks at full size; names and shapes are our classes'.

    python benchmarks/make_checkpoint.py OUT --what dit-1.3b,vae
    python benchmarks/make_checkpoint.py OUT --what dit-1.3b --layout diffusers  # and a config.json
    python benchmarks/make_checkpoint.py OUT --what dit-14b --sparse  # a header and 28 GB of nothing

Tensors are written one by one, so memory stays at one tensor; t5 has 11 GB. Weights of the DiT and of T5
are bfloat16, those of the VAE float32, as released; --dtype changes it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.full_size import NETWORKS, diffusers_config, random_checkpoint
from diffsynth.checkpoints.checkpoint import Checkpoint


def write_safetensors(file: Path, checkpoint: Checkpoint, sparse: bool = False) -> Path:
    """Header first, then one tensor after the other; ``sparse`` leaves a hole where the elements would be."""
    entries, end = {}, 0
    for name, shape in checkpoint.shapes.items():
        size = checkpoint.select([name]).num_bytes
        entries[name] = {
            "dtype": checkpoint.dtypes[name],
            "shape": list(shape),
            "data_offsets": [end, end + size],
        }
        end += size
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        if sparse:
            out.truncate(8 + len(header) + end)
        else:
            for name in checkpoint.shapes:
                _write_elements(out, checkpoint.tensor(name))
    return file


def _write_elements(out: IO[bytes], tensor: Tensor) -> None:
    out.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def write_torch_file(file: Path, checkpoint: Checkpoint) -> Path:
    """torch.save of tensors that are views of a file: written one by one, never all in memory."""
    mapped = write_safetensors(file.with_suffix(".part"), checkpoint)
    view = Checkpoint.open(mapped)
    torch.save({name: view.tensor(name) for name in view.shapes}, file)
    mapped.unlink()
    return file


def make(
    folder: Path,
    what: str,
    *,
    kind: str = "safetensors",
    layout: str = "official",
    dtype: torch.dtype | None = None,
    sparse: bool = False,
) -> Path:
    """Write one network and return its file."""
    if what not in NETWORKS:
        raise SystemExit(f"--what {what}: known are {', '.join(NETWORKS)}.")
    place = folder / (what if layout == "official" else f"{what}-{layout}")
    place.mkdir(parents=True, exist_ok=True)
    checkpoint = random_checkpoint(what, dtype, layout)
    if layout == "diffusers" and what != "t5":
        (place / "config.json").write_text(json.dumps(diffusers_config(what)))
    if kind == "pth":
        return write_torch_file(place / "model.pth", checkpoint)
    return write_safetensors(place / "diffusion_pytorch_model.safetensors", checkpoint, sparse)


def main(words: list[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--what", default="dit-1.3b,vae", help=f"comma-separated: {', '.join(NETWORKS)}")
    arguments.add_argument("--format", default="safetensors", choices=("safetensors", "pth"))
    arguments.add_argument("--layout", default="official", choices=("official", "diffusers"))
    arguments.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as released")
    arguments.add_argument(
        "--sparse", action="store_true", help="the header is real, the elements are a hole in the file"
    )
    given = arguments.parse_args(words)
    dtype = None if given.dtype is None else getattr(torch, given.dtype)
    for what in given.what.split(","):
        file = make(given.out, what, kind=given.format, layout=given.layout, dtype=dtype, sparse=given.sparse)
        print(f"{file}  {file.stat().st_size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
