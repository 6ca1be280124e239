"""Text features kept on the disk: a prompt that was encoded once needs its encoder no more.

One file per prompt and encoder, ``<hash of the cleaned text>-<hash of the encoder>.safetensors``, with one
tensor, ``features`` (tokens, D). An encoder is known by names, shapes and dtypes of its weights, by some of
their bytes, and by the ids that its tokenizer gives the text, so that one entry serves wherever and under
whatever name the encoder lies. Where no encoder is loaded an entry is found by the text alone, as long as it
is the only one: the log says that it was taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.saving import save_tensors
from diffsynth.conditioning.conditioner import Components
from diffsynth.errors import ArgumentError, CheckpointError, OutputPathError
from diffsynth.video.paths import check_output_path

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("diffsynth")

SAMPLED_BYTES = 64  # of each weight, at its start and in its middle
TENSOR = "features"


class TextCache:
    """The folder of ``cache_text=``, as one encoder sees it.

    Args:
        folder: created when the first entry is written.
        parts: the encoder and tokenizer that entries must come from; without them, see the module.
    """

    def __init__(self, folder: str | Path, parts: Components) -> None:
        if not isinstance(folder, (str, Path)) or not str(folder):
            raise ArgumentError(f"cache_text is {folder!r}; give the path of a folder.")
        self._folder = Path(folder).expanduser()
        self._parts = parts
        self._encoder_hash: bytes | None = None

    @property
    def has_encoder(self) -> bool:
        """Whether new entries can be made."""
        return self._parts.text_encoder is not None and self._parts.tokenizer is not None

    def check(self) -> None:
        """Make sure that entries can be written, before any work.

        Raises:
            OutputPathError: when the folder can be neither made nor written.
        """
        if self._folder.exists() and not self._folder.is_dir():
            raise OutputPathError(f"cache_text is {self._folder}, which is a file; give a folder.")
        check_output_path(self._folder / "entry.safetensors", suffixes=(".safetensors",))

    def find(self, text: str) -> Tensor | None:
        """Return the features (tokens, D) of a cleaned text, on the CPU, or None.

        A damaged entry is removed, with a warning.

        Raises:
            ArgumentError: when no encoder is loaded and the folder has entries of several.
        """
        path = self._path(text) if self.has_encoder else self._only_entry(text)
        if path is None or not path.is_file():
            return None
        try:
            return _read(path, text)
        except (CheckpointError, OSError) as error:
            logger.warning("A cached prompt is damaged and is made again: %s", error)
            with suppress(OSError):
                path.unlink()
            return None

    def store(self, text: str, features: Tensor) -> None:
        """Keep the features of a cleaned text.

        Raises:
            OutputPathError: when the disk refuses; nothing half-written stays.
        """
        path = self._path(text)
        check_output_path(path, suffixes=(".safetensors",))
        save_tensors(path, {TENSOR: features}, {"text": text, "sha256": _digest(features)})

    def _path(self, text: str) -> Path:
        assert self._parts.tokenizer is not None
        if self._encoder_hash is None:
            self._encoder_hash = fingerprint(self._parts.text_encoder)
        ids = ",".join(map(str, self._parts.tokenizer.encode(text))).encode()
        maker = sha256(self._encoder_hash + ids).hexdigest()[:16]
        return self._folder / f"{_text_hash(text)}-{maker}.safetensors"

    def _only_entry(self, text: str) -> Path | None:
        entries = sorted(self._folder.glob(f"{_text_hash(text)}-*.safetensors"))
        if len(entries) > 1:
            raise ArgumentError(
                f"{self._folder} holds {text[:60]!r} from {len(entries)} text encoders; load the one that is "
                "meant, or give a folder with entries of one encoder only."
            )
        return entries[0] if entries else None


def fingerprint(encoder: object, read: Callable[[str], Tensor] | None = None) -> bytes:
    """What tells one network from another: its class; name, shape, dtype, some bytes of each weight.

    A network may have more that decides its results, in ``identity_beside_weights``.

    Args:
        encoder: a network.
        read: gives a weight by its name, where the network is an outline without weights.
    """
    import torch
    from torch import nn

    encoder = getattr(encoder, "_orig_mod", encoder)  # inside of what torch.compile returns
    told = sha256(type(encoder).__qualname__.encode() + getattr(encoder, "identity_beside_weights", b""))
    if isinstance(encoder, nn.Module):
        for name, own in (*encoder.named_parameters(), *encoder.named_buffers()):
            tensor = own if read is None else read(name)
            told.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            flat = tensor.detach().flatten()
            count = SAMPLED_BYTES // tensor.element_size()
            for start in (0, tensor.numel() // 2):
                piece = flat[start : start + count].contiguous().view(torch.uint8)
                told.update(piece.cpu().numpy().tobytes())
    return told.digest()


def _read(path: Path, text: str) -> Tensor:
    file = Checkpoint.open(path)
    shape = file.shapes.get(TENSOR, ())
    if len(shape) != 2 or file.metadata.get("text") != text:
        raise CheckpointError(f"{path} does not hold the features of {text[:60]!r}.")
    features = file.tensor(TENSOR).clone()
    if _digest(features) != file.metadata.get("sha256"):
        raise CheckpointError(f"{path}: the features are not those that were written.")
    return features


def _text_hash(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _digest(features: Tensor) -> str:
    import torch

    return sha256(features.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
