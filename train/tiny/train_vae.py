"""Train the tiny VAE; goes on from where it was cut off."""

from __future__ import annotations

import math
import random
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffsynth.models.wan.vae import LATENT_MEAN, LATENT_STD, VAEConfig, WanVideoVAE
from diffsynth.models.wan.vae_layers import History, channels_last
from train.tiny.data import SIZE, vae_batch
from train.tiny.export import VAE_FILE, fold_statistics, write_vae
from train.tiny.muon import Muon
from train.tiny.state import Clock, Run, cosine

CONFIG = VAEConfig(dim=16, num_res_blocks=1)
LEARNING_RATE, POLISH_RATE = 4e-3, 1.5e-3
LENGTHS = {1: 0.08, 5: 0.17, 9: 0.2, 17: 0.4, 25: 0.15}  # frames of a clip: share of the batches
PIXELS = 6 * 17 * 32 * 32  # of one batch, whatever its sizes
LATENT_NOISE = 0.1  # in deviations of the latents: the decoder meets imperfect latents in use


def reconstruct(vae: WanVideoVAE, video: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return what comes back, (B, 3, F, H, W), and the raw latent means, both with gradients."""
    packed = video.contiguous(memory_format=torch.channels_last_3d)
    latents = vae.conv1(vae.encoder(packed, History()))[:, : vae.config.z_dim]
    noisy = latents + noise * latents.detach().std() * torch.randn_like(latents)
    return vae.decoder(vae.conv2(noisy), History()).float(), latents.float()


def loss_of(back: Tensor, video: Tensor, latents: Tensor) -> Tensor:
    """Mean error of the pixels, edges counting more, and a pull of the latents towards deviation 1."""
    edge = torch.zeros_like(video[:, :1])
    across = (video[..., 1:] - video[..., :-1]).abs().amax(dim=1, keepdim=True)
    along = (video[..., 1:, :] - video[..., :-1, :]).abs().amax(dim=1, keepdim=True)
    edge[..., 1:] += across
    edge[..., :-1] += across
    edge[..., 1:, :] += along
    edge[..., :-1, :] += along
    error = back - video
    weight = 1 + 2 * edge.clamp(max=1)
    return (weight * (error.abs() + error.square())).mean() + 1e-4 * latents.square().mean()


@torch.no_grad()
def psnr(vae: WanVideoVAE, num_frames: int, count: int, device: torch.device) -> float:
    """Mean PSNR in dB over held-out clips of one length."""
    video = vae_batch(random.Random(10_000 + num_frames), count, num_frames, SIZE, recoloured=0.0).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        back, _ = reconstruct(vae, video)
    mse = (back.clamp(-1, 1) - video).square().mean(dim=(1, 2, 3, 4)) / 4
    return float((-10 * mse.log10()).mean())


def train(out: Path, weights: Path, minutes: float, seed: int, device: torch.device) -> None:
    """Train for ``minutes`` of wall clock counted over all starts; the schedule follows the clock."""
    torch.manual_seed(seed)
    vae = WanVideoVAE(CONFIG).to(device)
    optimizer = Muon(vae.parameters(), lr=LEARNING_RATE, adam_lr=LEARNING_RATE, weight_decay=1e-2)
    run = Run(out / "vae.pt", {"vae": vae}, optimizer)
    clock = Clock(out / "vae.seconds", minutes)
    rng, recent = random.Random(seed + run.step), []
    while (progress := clock.progress()) < 1:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * cosine(progress)
        num_frames = rng.choices(list(LENGTHS), list(LENGTHS.values()))[0]
        crop = SIZE if rng.random() < 0.1 + 0.4 * progress else 32
        count = max(1, min(24, PIXELS // (num_frames * crop * crop)))
        video = vae_batch(rng, count, num_frames, crop).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            back, latents = reconstruct(vae, video, LATENT_NOISE)
        loss = loss_of(back, video, latents)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if run.step % 200 == 0:
            mean, recent = sum(recent) / len(recent), []
            quality = {
                n: round(psnr(vae, n, 4, device), 1) for n in ((17,) if run.step % 2000 else (1, 9, 17, 25))
            }
            print(
                f"step {run.step} {progress:.0%} loss {mean:.4f} deviation {latents.std():.2f} dB {quality}",
                flush=True,
            )
            if not math.isfinite(mean):
                raise SystemExit("the loss is not finite; start again with another seed")
        run.advance(lambda text: print(text, flush=True))
        clock.save()
    run.save()
    export(run, weights, device)


def polish(out: Path, weights: Path, minutes: float, seed: int, device: torch.device) -> None:
    """Train the decoder alone on whole pictures, for sharper edges; latents stay as they are.

    A DiT that was trained on this VAE's latents stays valid: run it before, after or beside.
    """
    torch.manual_seed(seed)
    vae = WanVideoVAE.from_config(asdict(CONFIG)).to(device)
    vae.load_state_dict({k: v.float() for k, v in load_file(weights / VAE_FILE).items()})
    vae.encoder.requires_grad_(False)
    vae.conv1.requires_grad_(False)
    decoder = torch.nn.ModuleDict({"conv2": vae.conv2, "decoder": vae.decoder})
    optimizer = Muon(decoder.parameters(), lr=POLISH_RATE, adam_lr=POLISH_RATE, weight_decay=0.0)
    run = Run(out / "polish.pt", {"decoder": decoder}, optimizer, ema=0.99)
    clock = Clock(out / "polish.seconds", minutes)
    rng = random.Random(seed + 77 + run.step)
    mean = torch.tensor(LATENT_MEAN, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(LATENT_STD, device=device).view(1, -1, 1, 1, 1)
    while (progress := clock.progress()) < 1:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * cosine(progress, warmup=0.03, floor=0.0)
        num_frames = rng.choices(list(LENGTHS), list(LENGTHS.values()))[0]
        video = vae_batch(rng, max(1, 68 // num_frames), num_frames, SIZE, recoloured=0.1).to(device)
        with torch.no_grad():
            latents = vae.encode(video, chunk_frames=24)
            latents = latents + 0.03 * torch.randn_like(latents) * latents.std()
        with torch.autocast(device.type, torch.bfloat16):
            back = vae.decoder(vae.conv2(channels_last(latents * std + mean)), History()).float()
        error = back - video
        loss = 10 * error.square().mean() + 0.1 * error.abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        if run.step % 50 == 0:
            quality = psnr(vae, 17, 4, device)
            print(f"polish {run.step} {progress:.0%} loss {loss.item():.4f} dB {quality:.2f}", flush=True)
        run.advance(lambda text: print(text, flush=True))
        clock.save()
    run.save()
    decoder.load_state_dict(run.average["decoder"])
    write_vae(vae.cpu(), weights)
    print(
        "held out, dB:",
        {n: round(psnr(vae, n, 32, torch.device("cpu")), 2) for n in (1, 5, 9, 17, 25)},
        flush=True,
    )


def export(run: Run, weights: Path, device: torch.device) -> None:
    """Write the averaged weights, with the latents' statistics folded in."""
    vae = run.networks["vae"]
    assert isinstance(vae, WanVideoVAE)
    vae.load_state_dict(run.average["vae"])
    with torch.no_grad():
        clips = (vae_batch(random.Random(n), 64, 17, SIZE, recoloured=0.0) for n in range(4))
        latents = torch.cat([vae.encode(clip, normalise=False, chunk_frames=16) for clip in clips]).cpu()
    vae.cpu()
    fold_statistics(vae, latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4)))
    write_vae(vae, weights)
    print(
        "held out, averaged weights, dB:",
        {n: round(psnr(vae, n, 32, torch.device("cpu")), 2) for n in (1, 5, 9, 17, 25)},
        flush=True,
    )
