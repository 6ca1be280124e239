"""Encoding a dataset into cached samples, against the same decoding and coding in a bare loop.

    python benchmarks/cache.py
    python benchmarks/cache.py --clips 10000 --repeats 1

The bare loop decodes by as many threads, encodes each distinct caption once and each clip by the VAE, and
keeps nothing. Ours also hashes every file, asks the conditioners for both sides of the guidance, and writes
and syncs one file per clip, from an empty cache each time. Networks are the tiny Wan; clips are drawn noise.
Seconds on the clock and of the processor are two rows: where other programs share the machine, read the
second.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.common import Row, interleaved, parser, report, set_threads
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.tiny import tiny_folder
from diffsynth.training.cache import process
from diffsynth.training.cache_config import CacheConfig
from diffsynth.training.dataset.clips import Clip, DatasetPlan, Item
from diffsynth.training.dataset.reading import read_clip
from diffsynth.video import frames_to_tensor, save_video

NUM_CAPTIONS = 8
FPS = 8
WARM_UP_CLIPS = 32


def write_clips(folder: Path, count: int, size: int, num_frames: int) -> DatasetPlan:
    """Small videos of noise; every eighth has the same caption."""
    clips = []
    for number in range(count):
        path = folder / f"{number:05}.mp4"
        pixels = np.random.default_rng(number).integers(0, 256, (num_frames, size, size, 3), dtype=np.uint8)
        save_video(pixels, str(path), fps=FPS, quality=5)
        item = Item(media=path, name=path.name, caption=f"a red ball number {number % NUM_CAPTIONS}")
        clips.append(
            Clip(
                item=item,
                dataset="noise",
                stem=path.stem,
                indices=tuple(range(num_frames)),
                height=size,
                width=size,
            )
        )
    return DatasetPlan(clips=tuple(clips))


def with_processor_time(work: Callable[[], int], seconds: list[float]) -> Callable[[], int]:
    """The work, adding the processor's seconds (of all threads) to a list."""

    def timed() -> int:
        start = time.process_time()
        done = work()
        seconds.append(time.process_time() - start)
        return done

    return timed


@torch.no_grad()
def bare_loop(plan: DatasetPlan, pipe: WanVideoPipeline, workers: int) -> int:
    """Decode in threads, encode; nothing is checked, hashed or kept."""
    parts = pipe.parts
    assert parts.vae is not None and parts.text_encoder is not None and parts.tokenizer is not None
    for caption in dict.fromkeys(["", *(clip.item.caption for clip in plan.clips)]):
        ids, _ = parts.tokenizer.batch([caption])
        parts.text_encoder(ids)
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        for clip, pixels in zip(plan.clips, pool.map(read_clip, plan.clips), strict=True):
            parts.vae.encode(frames_to_tensor(pixels.video, clip.height, clip.width))
            done += 1
    return done


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--clips", type=int, default=200)
    arguments.add_argument("--size", type=int, default=64, help="height and width in pixels")
    arguments.add_argument("--frames", type=int, default=17)
    arguments.add_argument("--workers", type=int, default=2, help="threads that decode, of both")
    given = arguments.parse_args(words)
    threads = set_threads(given.threads)
    logging.getLogger("diffsynth").setLevel(logging.ERROR)
    pipe = WanVideoPipeline.from_pretrained(tiny_folder(), torch_dtype=torch.float32, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        plan = write_clips(Path(folder), given.clips, given.size, given.frames)
        cache_dir = Path(folder) / "cache"
        config = CacheConfig(cache_dir=str(cache_dir), workers=given.workers)

        def ours() -> int:
            shutil.rmtree(cache_dir, ignore_errors=True)
            return process(plan, pipe, config).num_written

        few = DatasetPlan(clips=plan.clips[:WARM_UP_CLIPS])
        process(few, pipe, config)
        bare_loop(few, pipe, given.workers)
        processor: dict[str, list[float]] = {"ours": [], "bare": []}
        works = {
            "ours": with_processor_time(ours, processor["ours"]),
            "bare": with_processor_time(lambda: bare_loop(plan, pipe, given.workers), processor["bare"]),
        }
        seconds = interleaved(works, repeats=given.repeats, warmup=0)
        again = interleaved({"again": lambda: process(plan, pipe, config)}, repeats=1, warmup=0)
    what = f"cache {given.clips} clips, {given.frames} x {given.size} x {given.size}"
    rows = [
        Row(
            figure=f"{what}{kind}",
            unit="s",
            ours=spent["ours"],
            peer_name="bare loop, nothing hashed or written",
            peer=spent["bare"],
            goal=">= 0.9x of its speed",
            notes=f"tiny Wan, float32, {given.workers} decoding threads",
        )
        for kind, spent in (
            ("", seconds),
            (", of the processor", processor),
        )
    ]
    rows += [
        Row(figure="the same again, all cached", unit="s", ours=again["again"]),
    ]
    report("cache", rows, given.out, threads)


if __name__ == "__main__":
    main()
