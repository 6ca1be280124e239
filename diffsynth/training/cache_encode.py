"""Clips through text encoder, image encoder and VAE, into files: the work of data_process.

Threads decode ahead and write behind while this one codes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffsynth.errors import ArgumentError, MediaReadError, NotFiniteError
from diffsynth.training.cache_config import CacheConfig
from diffsynth.training.cache_writer import ReadAhead, SampleWriter
from diffsynth.training.dataset.clips import Clip, Dropped
from diffsynth.training.dataset.reading import ClipPixels
from diffsynth.training.samples import EncodedSample, map_tensors

if TYPE_CHECKING:
    from diffsynth.pipelines.components import PipelineComponents
    from diffsynth.pipelines.encoding import EncodingSession
    from diffsynth.pipelines.wan_video import WanVideoPipeline

logger = logging.getLogger("diffsynth")

GB = 10**9
EMPTY = ""  # the caption of the negative side


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A clip and the file that its sample goes to."""

    clip: Clip
    path: Path
    meta: Mapping[str, str]
    is_made: bool = False  # the file is there, and whole


@dataclass(kw_only=True)
class Tally:
    """Counts while the work goes on."""

    bar: Any
    strict: bool
    num_written: int = 0
    num_bytes: int = 0
    dropped: list[Dropped] = field(default_factory=list)

    def on_end(self, job: Job, outcome: int | NotFiniteError) -> None:
        if isinstance(outcome, NotFiniteError):
            return self.drop(job.clip, outcome)
        self.num_written += 1
        self.num_bytes += outcome
        self.bar.set_postfix_str(f"{self.num_bytes / GB:.2f} GB", refresh=False)
        self.bar.update()

    def drop(self, clip: Clip, error: Exception) -> None:
        media = clip.item.media
        reason = str(error) or type(error).__name__
        if self.strict:
            raise MediaReadError(f"{media} cannot be encoded: {reason}") from error
        logger.warning("%s is left out: %s", media, reason)
        self.dropped.append(Dropped(media=media, reason=reason, dataset=clip.dataset))
        self.bar.update()


def encode_all(
    todo: Sequence[Job], pipe: WanVideoPipeline, config: CacheConfig, tally: Tally,
    read: Callable[[Clip], ClipPixels], is_stopped: Callable[[], bool],
) -> int:  # fmt: skip
    """Encode and write, until the end or until it is stopped; returns how many texts were encoded."""
    texts: dict[str, Tensor] = {}
    num_captions = 0
    decoded = ReadAhead(todo, lambda job: read(job.clip), config.workers).run()
    try:
        with SampleWriter[Job](config.writers, tally.on_end) as writer:
            for begin in range(0, len(todo), config.block_clips):
                block = todo[begin : begin + config.block_clips]
                wanted = dict.fromkeys([EMPTY, *(job.clip.item.caption for job in block)])
                texts = {text: texts[text] for text in wanted if text in texts}
                new = [text for text in wanted if text not in texts]
                num_captions += len(new)
                if new:
                    with pipe.encoding("text_encoder") as session:
                        for text in takewhile(lambda _: not is_stopped(), new):
                            texts[text] = session.text(text).cpu()
                if is_stopped():
                    break
                with pipe.encoding("image_encoder", "vae") as session:
                    for job, pixels in islice(decoded, len(block)):
                        if sample := _sample(job, pixels, texts, session, pipe.parts, config, tally):
                            writer.put(job, sample, job.path)
                        if is_stopped():
                            return num_captions
    finally:
        decoded.close()
    return num_captions


def _sample(
    job: Job, pixels: ClipPixels | Exception, texts: Mapping[str, Tensor], session: EncodingSession,
    parts: PipelineComponents, config: CacheConfig, tally: Tally,
) -> EncodedSample | None:  # fmt: skip
    """One clip through VAE and conditioners; None when it is left out."""
    if isinstance(pixels, Exception):
        tally.drop(job.clip, pixels)
        return None
    tiles: dict[str, Any] = {}
    if config.tiled:
        tiles = {"tile_size": config.tile_size, "tile_stride": config.tile_stride}
    frames, height, width = job.clip.bucket
    arguments = {
        **_with_pictures(pixels, parts),
        "prompt_embeds": texts[job.clip.item.caption],
        "negative_prompt_embeds": texts[EMPTY],
        "cfg_scale": 5.0,  # any but 1: both sides are wanted
        "height": height, "width": width, "num_frames": frames, "strict": True, "tiled": config.tiled,
        **tiles,
    }  # fmt: skip
    try:
        merged = session.conditions(arguments)
        latents = session.latents(pixels.video, **tiles)
    except ArgumentError as error:
        tally.drop(job.clip, error)
        return None
    dtype = getattr(torch, config.dtype)

    def stored(tensor: Tensor) -> Tensor:
        # Latents and planes; text keeps the dtype of its encoder, numbers of adapters their own.
        return tensor.to(dtype) if tensor.ndim == 5 and tensor.dtype == torch.float32 else tensor

    positive, negative, plan = map_tensors((merged.positive, merged.negative, merged.latents), stored)
    return EncodedSample(
        latents=stored(latents), positive=positive, negative=negative, plan=plan, meta=dict(job.meta)
    )


def _with_pictures(pixels: ClipPixels, parts: PipelineComponents) -> dict[str, object]:
    """A model that continues a picture learns from the clip's first frame, and last, if none is given."""
    inputs = dict(pixels.inputs)
    if {"mask", "image"} == set(parts.facts.planes) and inputs.get("input_image") is None:
        inputs["input_image"] = pixels.video[0].numpy()
        if parts.facts.has_image_positions and inputs.get("end_image") is None:
            inputs["end_image"] = pixels.video[-1].numpy()
    return inputs
