"""Cached clips of DiffSynth-Studio v1, ``clip.mp4.tensors.pth``, read without running any pickle's code.

They hold the latent (16, T, h, w), features of the caption padded to 512 rows, and for image-to-video
features of the first frame and the planes ``y``: mask (4 channels) and image (16).
There is no empty caption, and nothing says which encoders made them.
Source: v1's ``examples/wanvideo/train_wan_t2v.py``.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from diffsynth.conditioning.conditions import Conditions
from diffsynth.errors import CorruptCheckpointError, UnsafeCheckpointError
from diffsynth.models.wan.dit_config import MASK_CHANNELS
from diffsynth.training.samples import EncodedSample, SampleHeader

V1_SUFFIX = ".tensors.pth"
SAMPLED_BYTES = 1 << 16  # at the beginning and at the end, for the sample's id


def load_v1(path: str | Path) -> EncodedSample:
    """Read one file of v1's cache.

    Returns:
        The sample; its negative side is None.

    Raises:
        UnsafeCheckpointError: for a pickle that holds more than tensors, dicts and texts.
        CorruptCheckpointError: for a damaged file, or one that holds something else.
    """
    path = Path(path)
    content = _content(path)
    latents, text, image = (content.get(name) for name in ("latents", "prompt_emb", "image_emb"))
    context = text.get("context") if isinstance(text, dict) else None
    if not (isinstance(latents, Tensor) and latents.ndim == 4 and isinstance(context, Tensor)):
        raise CorruptCheckpointError(
            f"{path} is no clip cached by DiffSynth v1: expected 'latents' (16, T, h, w) and 'prompt_emb' "
            f"with 'context'; found {', '.join(map(str, content)) or 'nothing'}. Make it anew: "
            "--task data_process."
        )
    rows = context.reshape(1, -1, context.shape[-1])
    used = int((rows != 0).any(dim=(0, 2)).sum())
    features, planes = _picture(path, image if isinstance(image, dict) else {})
    positive = Conditions(text=rows[:, : max(used, 1)].clone(), image=features, planes=planes)
    meta = {"key": _id_of(path), "media": path.name.removesuffix(V1_SUFFIX), "preprocessing": "DiffSynth v1"}
    return EncodedSample(latents=latents[None].clone(), positive=positive, negative=None, meta=meta)


def header_v1(path: str | Path) -> SampleHeader:
    """Shapes and structure of one file of v1's cache; raises as `load_v1`."""
    return load_v1(path).described(Path(path))


def _content(path: Path) -> Mapping[object, object]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            f"{path} asks for more than tensors when it is read, or is damaged; nothing of it was run. "
            "Make it anew: --task data_process."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CorruptCheckpointError(
            f"{path} cannot be read ({str(error).splitlines()[0][:120]}); make it anew: --task data_process."
        ) from error
    return content if isinstance(content, dict) else {}


def _picture(path: Path, found: Mapping[str, object]) -> tuple[Tensor | None, dict[str, Tensor]]:
    features, planes = found.get("clip_feature"), found.get("y")
    if not isinstance(planes, Tensor):
        return (features.clone() if isinstance(features, Tensor) else None), {}
    planes = planes if planes.ndim == 5 else planes[None]
    if planes.ndim != 5 or planes.shape[1] <= MASK_CHANNELS:
        raise CorruptCheckpointError(
            f"{path}: 'y' has the shape {tuple(planes.shape)}; expected (1, 20, T, h, w), mask and image. "
            "Make it anew: --task data_process."
        )
    parts = {"mask": planes[:, :MASK_CHANNELS].clone(), "image": planes[:, MASK_CHANNELS:].clone()}
    return (features.clone() if isinstance(features, Tensor) else None), parts


def _id_of(path: Path) -> str:
    """A name that stays the same wherever the file lies."""
    size = path.stat().st_size
    told = blake2b(f"{path.name} {size}".encode(), digest_size=8)
    with path.open("rb") as file:
        told.update(file.read(SAMPLED_BYTES))
        file.seek(max(0, size - SAMPLED_BYTES))
        told.update(file.read())
    return told.hexdigest()
