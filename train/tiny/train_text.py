"""Train the tiny text encoder; goes on where it was cut off.

What words have to tell a DiT is learnt together with one. That DiT is not written: on the text encoder that
stands then one is trained by the package's own trainer (`train/recipes/tiny.yaml`). The DiT that ships is
still that of such a run as this.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from diffsynth.conditioning.conditions import Conditions
from diffsynth.conditioning.tokenizer import Tokenizer, find_tokenizer
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.dit_config import DiTConfig
from diffsynth.models.wan.text_encoder import TextEncoderConfig, WanTextEncoder
from diffsynth.models.wan.vae import WanVideoVAE
from diffsynth.sampling.schedule import add_noise
from diffsynth.tiny import tiny_folder
from diffsynth.tiny.draw import draw_batch
from diffsynth.tiny.grammar import Scene, caption
from train.tiny.data import SIZE, draw_scenes
from train.tiny.export import VAE_FILE, write_text_encoder
from train.tiny.muon import Muon
from train.tiny.state import Clock, Run, cosine, save_whole

# Tokens of one latent position: 4 times as many as large models have, each of which is far easier to learn.
DIT = DiTConfig(
    dim=128, in_dim=16, out_dim=16, ffn_dim=384, num_layers=6, num_heads=4, freq_dim=64, text_dim=128,
    text_len=64, patch_size=(1, 1, 1),
)  # fmt: skip
TEXT = {"dim": 128, "dim_attn": 128, "dim_ffn": 256, "num_heads": 4, "num_layers": 3}
CLIPS = {17: 12000, 9: 1500, 25: 1500, 5: 1000}  # encoded once, by number of frames
PAIRS = 0.12  # share of scenes with two things, which are learnt last
TOKENS = 7680  # of a batch: short clips come more at once
MOMENT = 0  # instead of a number of frames: one later latent alone, four frames of a clip
# First what things look like, from first frames alone (5 times as many a second). Then moments: with no frame
# before or after to tell the way of a thing, the model has to read the caption; in whole clips it never
# learnt to. Then whole clips. Shares of the batches from each share of the run on.
STAGES: tuple[tuple[float, dict[int, float]], ...] = (
    (0.0, {1: 0.8, 5: 0.2}),
    (0.2, {MOMENT: 0.9, 1: 0.1}),
    (0.35, {17: 0.5, MOMENT: 0.25, 9: 0.13, 25: 0.07, 1: 0.05}),
    (0.8, {17: 0.68, 9: 0.16, 25: 0.08, 1: 0.05, 5: 0.03}),
)
LEARNING_RATE, ADAM_LEARNING_RATE = 4e-3, 1.5e-3
# Noise levels lean to the noisy end, where place and path of a thing are decided; less so in one latent,
# whose noise hides all the more.
SHIFT, SHIFT_OF_ONE = 5.0, 3.0
EMPTY_PROMPTS = 0.1  # share of captions left out, so that guidance has something to lead away from


class Clips:
    """Encoded clips with their scenes, by number of frames; captions are worded anew each time."""

    def __init__(self, vae: WanVideoVAE, path: Path, seed: int) -> None:
        self.scenes: dict[int, list[Scene]] = {}
        self.latents: dict[int, Tensor] = torch.load(path, weights_only=True) if path.exists() else {}
        for num_frames, count in CLIPS.items():
            self.scenes[num_frames] = draw_scenes(random.Random(seed + num_frames), count, num_frames, PAIRS)
            if num_frames not in self.latents:
                started = time.monotonic()
                self.latents[num_frames] = _encode(vae, self.scenes[num_frames], num_frames)
                save_whole(dict(self.latents), path)  # type: ignore[arg-type]
                print(
                    f"{count} clips of {num_frames} frames encoded in {time.monotonic() - started:.0f} s",
                    flush=True,
                )

    def batch(self, rng: random.Random, shares: dict[int, float]) -> tuple[Tensor, list[str]]:
        """Latents (B, C, F, h, w) float32 and their captions; ``shares`` of clips by number of frames."""
        num_frames = rng.choices(list(shares), list(shares.values()))[0]
        # The first latent holds the first frame alone, so that any clip gives a still.
        source = num_frames if num_frames > 1 else rng.choices(list(CLIPS), list(CLIPS.values()))[0]
        latents, scenes = self.latents[source], self.scenes[source]
        length = 1 + (num_frames - 1) // 4 if num_frames != MOMENT else 1
        picked = [rng.randrange(len(scenes)) for _ in range(TOKENS // (length * latents[0, 0, 0].numel()))]
        texts = ["" if rng.random() < EMPTY_PROMPTS else caption(scenes[i], rng) for i in picked]
        starts = [rng.randrange(1, latents.shape[2]) if num_frames == MOMENT else 0 for _ in picked]
        rows = [latents[i, :, start : start + length] for i, start in zip(picked, starts, strict=True)]
        return torch.stack(rows).float(), texts


@torch.no_grad()
def _encode(vae: WanVideoVAE, scenes: list[Scene], num_frames: int, at_once: int = 8) -> Tensor:
    rows, device = [], vae.conv1.weight.device
    for start in range(0, len(scenes), at_once):
        video = draw_batch(scenes[start : start + at_once], num_frames, SIZE)
        rows.append(vae.encode(video.to(device), chunk_frames=24).to("cpu", torch.float16))
    return torch.cat(rows)


def encode_text(encoder: WanTextEncoder, tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Features (B, tokens, D), zero where a text has ended."""
    ids, mask = (t.to(encoder.device) for t in tokenizer.batch(texts))
    features = encoder(ids, mask)
    return pad_sequence(
        [row[: int(m.sum())] for row, m in zip(features, mask, strict=True)], batch_first=True
    )


def flow_loss(
    dit: WanDiT, encoder: WanTextEncoder, tokenizer: Tokenizer, latents: Tensor, texts: list[str]
) -> Tensor:
    """Mean squared error of the velocity at one random noise level per clip."""
    even = (torch.arange(len(latents)) + torch.rand(len(latents))) / len(
        latents
    )  # one per stratum: less noise
    shift = SHIFT if latents.shape[2] > 1 else SHIFT_OF_ONE
    sigma = shift * even / (1 + (shift - 1) * even)
    sigma = sigma[torch.randperm(len(sigma))].to(latents.device)
    noise = torch.randn_like(latents)
    text = encode_text(encoder, tokenizer, texts)
    [velocity] = dit(add_noise(latents, noise, sigma), sigma * 1000, [dit.prepare(Conditions(text=text))])
    return (velocity.float() - (noise - latents)).square().mean()


def _shares(progress: float) -> dict[int, float]:
    """Shares of the batches at a share of the run."""
    return [shares for since, shares in STAGES if progress >= since][-1]


@contextmanager
def _fast(device: torch.device) -> Iterator[None]:
    """Matrix products in bfloat16; on a CPU attention as plain products, 1.2 times as fast as fused here."""
    with torch.autocast(device.type, torch.bfloat16):
        if device.type != "cpu":
            yield
            return
        with sdpa_kernel(SDPBackend.MATH):
            yield


def train(out: Path, weights: Path, minutes: float, seed: int, device: torch.device) -> None:
    """Train for ``minutes`` of wall clock counted over all starts; write the text encoder's averaged weights.

    Args:
        out: where the state of the run lies.
        weights: where the VAE lies, and where the finished file goes.
        minutes: wall clock, over all starts.
        seed: of everything drawn.
        device: where it is trained.
    """
    torch.manual_seed(seed)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # else plain attention widens to float32
    vae = (
        ModelManager(torch_dtype=torch.bfloat16, device="cpu")
        .load_models([weights / VAE_FILE])
        .fetch_model("wan_video_vae")
    )
    assert isinstance(vae, WanVideoVAE)
    clips = Clips(vae.to(device), out / "latents.pt", seed)
    tokenizer = Tokenizer(find_tokenizer(tiny_folder() / "x"))
    text_config = TextEncoderConfig(vocab_size=tokenizer.size, **TEXT)
    dit, encoder = WanDiT(DIT).to(device), WanTextEncoder(text_config).to(device)
    torch.nn.init.zeros_(dit.head.head.weight)
    torch.nn.init.normal_(encoder.token_embedding.weight, std=1.0)
    optimizer = Muon([*dit.parameters(), *encoder.parameters()], LEARNING_RATE, ADAM_LEARNING_RATE, 1e-2)
    run = Run(out / "text.pt", {"dit": dit, "text": encoder}, optimizer, ema=0.999)
    clock = Clock(out / "text.seconds", minutes)
    rng, recent = random.Random(seed + run.step), []
    torch.manual_seed(seed + run.step)
    while (progress := clock.progress()) < 1:
        for group in optimizer.param_groups:
            rate = LEARNING_RATE if group["muon"] else ADAM_LEARNING_RATE
            group["lr"] = rate * cosine(progress)
        latents, texts = clips.batch(rng, _shares(progress))
        with _fast(device):
            loss = flow_loss(dit, encoder, tokenizer, latents.to(device), texts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*dit.parameters(), *encoder.parameters()], 1.0)
        optimizer.step()
        recent.append(loss.item())
        if run.step % 100 == 0:
            print(f"step {run.step} {progress:.0%} loss {sum(recent) / len(recent):.4f}", flush=True)
            recent = []
        run.advance(lambda text: print(text, flush=True))
        clock.save()
    run.save()
    encoder.load_state_dict(run.average["text"])
    write_text_encoder(encoder.cpu(), text_config, weights)
