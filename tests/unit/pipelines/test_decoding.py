"""Decoding steps down when memory runs out: every frame once, none half, and nothing left behind."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffsynth.errors import ArgumentError, MissingModelError
from diffsynth.models.wan.vae import WanVideoVAE
from diffsynth.pipelines.components import PipelineComponents
from diffsynth.pipelines.decoding import VideoDecoder, decoded_chunks
from diffsynth.pipelines.rungs import Rung, Tiling, ladder
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.video import tensor_to_frames
from tests.toys import TOY_VAE
from tests.unit.pipelines.counting import calls_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # named only: nothing is put on it
SIZE, TILE, STRIDE = (4, 6), (3, 4), (2, 3)  # latent positions
TILES = Tiling(None, TILE, STRIDE)
WHOLE, TILED, ON_CPU = Rung(), Rung(tile_size=TILE, tile_stride=STRIDE), Rung(is_on_cpu=True)


@pytest.fixture(scope="module")
def vae() -> WanVideoVAE:
    torch.manual_seed(3)
    return WanVideoVAE(TOY_VAE).eval()


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(1, 16, 5, *SIZE, generator=torch.Generator().manual_seed(5))  # 17 frames 32 x 48


class ShortOfMemory(nn.Module):
    """A VAE that runs out of memory at one chunk of a picture or tile of some size, once per entry.

    Args:
        vae: does the work.
        failures: height and width of what is decoded, and the chunk.
    """

    def __init__(self, vae: WanVideoVAE, *failures: tuple[tuple[int, int], int]) -> None:
        super().__init__()
        self.vae, self.failures = vae, list(failures)
        self.z_dim, self.spatial_stride, self.temporal_stride = vae.z_dim, 8, 4
        self.error: RuntimeError = torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. More words."
        )
        self.sizes: list[tuple[int, int]] = []
        self.places: list[str] = []  # of the weights
        self._last: weakref.ref[Tensor] | None = None

    def decode_stream(self, latents: Tensor) -> Iterator[Tensor]:
        size = (latents.shape[3], latents.shape[4])
        self.sizes.append(size)
        self.places.append(next(self.vae.parameters()).device.type)
        assert self._last is None or self._last() is None, "the failed attempt still holds its tensors"
        for index, chunk in enumerate(self.vae.decode_stream(latents)):
            if (size, index) in self.failures:
                self.failures.remove((size, index))
                self._last = weakref.ref(chunk)
                raise type(self.error)(*self.error.args)  # which holds nothing of an earlier attempt
            yield chunk


def decoder(vae: Any, tiling: Tiling = TILES, device: torch.device = CPU, **more: Any) -> VideoDecoder:
    return VideoDecoder(vae=vae, device=device, tiling=tiling, **more)


@pytest.fixture(scope="module")
def whole(vae: WanVideoVAE, latents: Tensor) -> NDArray[np.uint8]:
    """The frames of an untiled decode."""
    with torch.no_grad():
        return tensor_to_frames(vae.decode(latents))[0]


@pytest.fixture(scope="module")
def tiled(vae: WanVideoVAE, latents: Tensor) -> NDArray[np.uint8]:
    """The frames of a decode in tiles."""
    with torch.no_grad():
        return tensor_to_frames(vae.decode(latents, tile_size=TILE, tile_stride=STRIDE))[0]


def stacked(video: Any) -> NDArray[Any]:
    return np.stack([np.asarray(frame) for frame in video])


def tiles(size: tuple[int, int], stride: tuple[int, int], **more: bool) -> Rung:
    return Rung(tile_size=size, tile_stride=stride, **more)


LARGE, HALF = tiles((12, 20), (5, 9)), tiles((8, 10), (4, 5), has_sums_on_host=True)


@pytest.mark.parametrize(
    ("tiling", "device", "by_plan", "expected"),
    [
        (Tiling(None, (12, 20), (5, 9)), GPU, False, [WHOLE, LARGE, HALF, ON_CPU]),
        (Tiling(None, (12, 20), (5, 9)), GPU, True, [LARGE, HALF, ON_CPU]),
        (Tiling(True, (12, 20), (5, 9)), CPU, False, [LARGE, HALF]),
        (Tiling(False, (12, 20), (5, 9)), GPU, True, [WHOLE]),
        (Tiling(), GPU, True, [WHOLE, tiles((15, 26), (8, 13), has_sums_on_host=True), ON_CPU]),
        (Tiling(None, (4, 4)), CPU, False, [WHOLE, tiles((4, 4), (2, 2))]),
    ],
    ids=["auto", "planned", "tiled", "untiled", "tiles-larger-than-the-picture", "small-tiles"],
)
def test_rungs(tiling: Tiling, device: torch.device, by_plan: bool, expected: list[Rung]) -> None:
    assert ladder(tiling, (20, 26), device, tiled_by_plan=by_plan) == expected


def test_the_rungs_of_480p_are_legal_tiles() -> None:
    rungs = ladder(Tiling(), (60, 104), GPU)
    assert [(rung.tile_size, rung.tile_stride) for rung in rungs[1:3]] == [
        ((30, 52), (15, 26)),
        ((15, 26), (8, 13)),
    ]
    assert [str(rung) for rung in rungs] == [
        "the whole picture", "tiles of 30 x 52", "tiles of 15 x 26", "the whole picture on the CPU",
    ]  # fmt: skip


@pytest.mark.parametrize("has_sums_on_host", [False, True])
def test_tiles_chunk_by_chunk_equal_the_decode_of_the_vae(
    vae: WanVideoVAE, latents: Tensor, has_sums_on_host: bool
) -> None:
    few = latents[:, :, :3]
    rung = tiles(TILE, STRIDE, has_sums_on_host=has_sums_on_host)
    with torch.no_grad():
        expected = vae.decode(few, tile_size=TILE, tile_stride=STRIDE)
        chunks = [chunk.clone() for chunk in decoded_chunks(vae, few, rung)]
    assert torch.equal(torch.cat(chunks, dim=2), expected)


def test_a_stream_gives_the_frames_of_a_whole_decode(
    vae: WanVideoVAE, latents: Tensor, whole: NDArray[np.uint8]
) -> None:
    frames = list(decoder(vae).frames(latents))
    assert np.array_equal(frames, whole) and frames[0].shape == (32, 48, 3)
    assert np.array_equal(stacked(decoder(vae).videos(latents, "pil", is_batch=False)), whole)


def test_a_stream_holds_back_no_more_than_its_first_chunks(vae: WanVideoVAE, latents: Tensor) -> None:
    with calls_of(vae.decoder) as calls:
        frames = decoder(vae).frames(latents)
        assert calls == []
        for count in range(1, 10):
            next(frames)
            assert len(calls) == 3, count
        next(frames)
        assert len(calls) == 4, "the next chunk is decoded when its first frame is asked for"
        frames.close()


@pytest.mark.parametrize("chunk", [0, 2])
def test_memory_that_runs_out_at_the_start_gives_one_rung(
    vae: WanVideoVAE,
    latents: Tensor,
    tiled: NDArray[np.uint8],
    chunk: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    frames = list(decoder(ShortOfMemory(vae, (SIZE, chunk))).frames(latents))
    assert np.array_equal(frames, tiled)
    told = "decoding the whole picture (CUDA out of memory); decoding tiles of 3 x 4 instead."
    assert told in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("chunk", [3, 4])
def test_memory_that_runs_out_later_gives_no_frame_twice(
    vae: WanVideoVAE,
    latents: Tensor,
    whole: NDArray[np.uint8],
    tiled: NDArray[np.uint8],
    chunk: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    frames = list(decoder(ShortOfMemory(vae, (SIZE, chunk))).frames(latents))
    cut = 1 + 4 * (chunk - 1)
    assert np.array_equal(frames, [*whole[:cut], *tiled[cut:]])
    assert f"from frame {cut} on" in caplog.text


def test_a_complete_decode_is_of_one_rung_wherever_memory_ran_out(
    vae: WanVideoVAE, latents: Tensor, tiled: NDArray[np.uint8]
) -> None:
    short = decoder(ShortOfMemory(vae, (SIZE, 4)))
    assert np.array_equal(stacked(short.videos(latents, "pil", is_batch=False)), tiled)
    floats = decoder(ShortOfMemory(vae, (SIZE, 4))).videos(latents, "np", is_batch=False)
    # rounded to the nearest level; float32 leaves ties a hair on either side
    assert np.abs(floats[0] * 255 - tiled).max() < 0.5001


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_ladder_goes_down_to_the_cpu_and_brings_the_vae_back(vae: WanVideoVAE, place: str) -> None:
    away = WanVideoVAE(TOY_VAE)
    away.load_state_dict(vae.state_dict())
    away.to(place)
    before = [(tensor.data_ptr(), tensor.device) for tensor in away.parameters()]
    latents = torch.randn(1, 16, 2, 9, 11, generator=torch.Generator().manual_seed(5))
    short = ShortOfMemory(away, ((9, 11), 0), ((9, 10), 0), ((8, 8), 0))
    frames = list(decoder(short, Tiling(None, (9, 10)), GPU).frames(latents))
    with torch.no_grad():
        assert np.array_equal(frames, tensor_to_frames(vae.decode(latents))[0])
    assert short.sizes == [(9, 11), (9, 10), (8, 8), (9, 11)]
    assert short.places == [place, place, place, "cpu"]
    assert [(tensor.data_ptr(), tensor.device) for tensor in away.parameters()] == before


def test_untiled_means_untiled(vae: WanVideoVAE, latents: Tensor) -> None:
    short = ShortOfMemory(vae, (SIZE, 0))
    asked = decoder(short, Tiling(False), GPU)
    with pytest.raises(torch.OutOfMemoryError, match=r"tiled=False asked for nothing else: leave it out"):
        next(asked.frames(latents))
    assert short.sizes == [SIZE]


def test_the_last_rung_says_so(vae: WanVideoVAE, latents: Tensor) -> None:
    short = ShortOfMemory(vae, (SIZE, 0), (TILE, 0))
    with pytest.raises(torch.OutOfMemoryError, match=r"tiles of 3 x 4 \(CUDA out of memory\). Nothing small"):
        decoder(short).videos(latents, "pt", is_batch=False)


class OfCUDA(RuntimeError):
    """As torch.AcceleratorError, which not every torch has."""

    error_code = 2


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("GET was unable to find an engine to execute this computation"),
        OfCUDA("HIP error: hipErrorOutOfMemory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=["no-engine", "accelerator-by-its-code", "cuda-by-its-words", "cudnn"],
)
def test_the_ladder_knows_the_words_of_cuda_and_cudnn(
    vae: WanVideoVAE, latents: Tensor, tiled: NDArray[np.uint8], error: RuntimeError
) -> None:
    short = ShortOfMemory(vae, (SIZE, 0))
    short.error = error
    assert np.array_equal(list(decoder(short).frames(latents)), tiled)
    with pytest.raises(torch.OutOfMemoryError, match="Nothing smaller is left"):
        short.failures += [(SIZE, 0), (TILE, 0)]
        decoder(short).videos(latents, "pt", is_batch=False)


def test_other_errors_pass(vae: WanVideoVAE, latents: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Iterator[Tensor]:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(WanVideoVAE, "decode_stream", broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        decoder(vae).videos(latents, "pt", is_batch=False)


WRONG_LATENTS = [
    (torch.zeros(1, 48, 2, 2, 4), r"shape \(1, 48, 2, 2, 4\); this VAE decodes .*\(B, 16, T, h, w\)"),
    (torch.zeros(16, 2, 2, 4), "this VAE decodes"),
    (torch.zeros(1, 16, 0, 2, 4), "this VAE decodes"),
    (torch.zeros(1, 16, 2, 2, 4, dtype=torch.int32), "latents are torch.int32"),
]


@pytest.mark.parametrize(("wrong", "words"), WRONG_LATENTS, ids=["channels", "axes", "empty", "integers"])
def test_latents_that_do_not_fit_are_told_before_the_vae_is_asked(
    toy_pipe: WanVideoPipeline, wrong: Tensor, words: str
) -> None:
    with calls_of(toy_pipe.parts.vae.decoder) as calls:
        for decode in (toy_pipe.decode, toy_pipe.decode_stream):
            with pytest.raises(ArgumentError, match=words):
                decode(wrong)
    assert calls == []


def test_decode_finishes_what_a_call_began(toy_pipe: WanVideoPipeline) -> None:
    latents = toy_pipe(["a red circle", "a square"], seed=0, output_type="latent")
    for kind in ("pt", "np", "pil"):
        whole = toy_pipe(["a red circle", "a square"], seed=0, output_type=kind)
        later = toy_pipe.decode(latents, output_type=kind)
        for a, b in zip(whole, later, strict=True):
            assert np.array_equal(stacked(a), stacked(b))
    streamed = list(toy_pipe.decode_stream(latents[1:]))
    assert np.array_equal(streamed, stacked(whole[1]))
    assert np.array_equal(streamed, stacked(toy_pipe.decode(latents[1:])))


def test_a_stream_left_early_leaves_the_pipeline_usable(toy_pipe: WanVideoPipeline) -> None:
    latents = torch.zeros(2, 16, 2, 2, 4)
    with pytest.raises(ArgumentError, match=r"latents hold 2 videos; give one: latents\[i : i \+ 1\]"):
        toy_pipe.decode_stream(latents)
    frames = toy_pipe.decode_stream(latents[:1])
    next(frames)
    frames.close()
    assert len(toy_pipe.decode(latents)) == 2
    with pytest.raises(ArgumentError, match="output_type is 'latent'; known: pil, pt, np"):
        toy_pipe.decode(latents, output_type="latent")
    with pytest.raises(ArgumentError, match="larger than tile_size"):
        toy_pipe.decode(latents, tile_size=(2, 2), tile_stride=(3, 3))


def test_a_pipeline_without_vae_says_so() -> None:
    pipe = WanVideoPipeline(PipelineComponents(device=CPU, dtype=torch.float32))
    with pytest.raises(MissingModelError, match="No VAE is loaded"):
        pipe.decode(torch.zeros(1, 16, 2, 2, 4))


def test_v1_decodes_in_tiles_unless_told_otherwise() -> None:
    assert [Tiling(asked).starts_tiled("v1") for asked in (None, True, False)] == [True, True, False]
    assert [Tiling(asked).starts_tiled("official") for asked in (None, True, False)] == [None, True, False]
