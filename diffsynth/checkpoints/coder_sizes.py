"""Sizes of the VAEs and of the text, image and audio encoders, read from names and shapes."""

from __future__ import annotations

from math import isfinite, isqrt

from diffsynth.checkpoints.hints import Hints, Shapes, count_of, size_of
from diffsynth.errors import ConfigurationError

Config = dict[str, object]
VAE_SPELLINGS = {
    "base_dim": "dim",
    "decoder_base_dim": "dec_dim",
    "temperal_downsample": "temporal_downsample",
}
IMAGE_HEAD_SIZE = 80  # open-clip ViT-H/14: 1280 channels, 16 heads
AUDIO_HEAD_SIZE = 64  # wav2vec2: 1024 channels, 16 heads


def vae21_config(shapes: Shapes, hints: Hints) -> Config:
    """Return sizes of the Wan2.1 VAE, whose stages stand in one flat list."""
    kinds = _flat_kinds(shapes)
    stages: list[list[str]] = [[]]
    for name, kind in kinds:
        stages[-1].append(name)
        if kind == "resample":
            stages.append([])
    return _vae_config(shapes, hints, stages, "2.1")


def vae22_config(shapes: Shapes, hints: Hints) -> Config:
    """Return sizes of the Wan2.2 VAE, whose stages are lists of their own."""
    stages = []
    for i in range(count_of(shapes, "encoder.downsamples.")):
        inner = f"encoder.downsamples.{i}.downsamples."
        stages.append([f"{inner}{j}" for j in range(count_of(shapes, inner))])
    config = _vae_config(shapes, hints, stages, "2.2")
    mult = config["dim_mult"]
    assert isinstance(mult, tuple)
    config["dec_dim"] = size_of(shapes, "decoder.head.0.gamma", 0) // mult[0]
    return config


def _flat_kinds(shapes: Shapes) -> list[tuple[str, str]]:
    prefix, kinds = "encoder.downsamples.", []
    for i in range(count_of(shapes, prefix)):
        name = f"{prefix}{i}"
        kinds.append((name, "resample" if f"{name}.resample.1.weight" in shapes else "block"))
    return kinds


def _vae_config(shapes: Shapes, hints: Hints, stages: list[list[str]], version: str) -> Config:
    dim, z_dim = size_of(shapes, "encoder.conv1.weight", 0), size_of(shapes, "conv2.weight", 0)
    mult, temporal, blocks, attention = [], [], 0, []
    for i, stage in enumerate(stages):
        residual = [name for name in stage if f"{name}.residual.2.weight" in shapes]
        if not residual:
            raise ConfigurationError(
                f"Stage {i} of the VAE's encoder has no residual block; the file is incomplete."
            )
        width = size_of(shapes, f"{residual[-1]}.residual.2.weight", 0)
        if width % dim:
            raise ConfigurationError(
                f"Stage {i} of the VAE's encoder has {width} channels, no multiple of {dim}."
            )
        mult.append(width // dim)
        blocks = max(blocks, len(residual))
        temporal += [
            f"{name}.time_conv.weight" in shapes for name in stage if f"{name}.resample.1.weight" in shapes
        ]
        if any(f"{name}.to_qkv.weight" in shapes for name in stage):
            attention.append(0.5**i)
    sizes: Config = {
        "dim": dim,
        "z_dim": z_dim,
        "dim_mult": tuple(mult),
        "num_res_blocks": blocks,
        "temporal_downsample": tuple(temporal),
        "attn_scales": tuple(attention),
    }
    told = hints.told("vae", sizes, VAE_SPELLINGS)
    return {**sizes, **_statistics(told, z_dim, hints), "version": version}


def _statistics(told: Config, z_dim: int, hints: Hints) -> Config:
    """Mean and deviation of the latents where a document tells both; else the released VAE's are used.

    Raises:
        ConfigurationError: for statistics that cannot be: latents would be NaN, or of another scale.
    """
    found: Config = {}
    for name, short in (("latents_mean", "mean"), ("latents_std", "std")):
        row = told.get(name, told.get(short))
        if row is None:
            continue
        numbers = row if isinstance(row, tuple) else ()
        is_right = len(numbers) == z_dim and all(map(_is_number, numbers))
        if not is_right or (short == "std" and min(numbers) <= 0):
            raise ConfigurationError(
                f"{name} is {row!r}; it has {z_dim} numbers, one for each latent channel"
                f"{', all above 0' if short == 'std' else ''}. Correct it in the config.json beside the "
                "file, or take it out: the released VAE's are used then."
            )
        found[name] = tuple(float(x) for x in numbers)
    if len(found) == 1:
        (name,) = found
        hints.assume(f"{name} was left aside: latents_mean and latents_std are read together.")
        return {}
    if found:
        hints.assume("latents are normalised with the latents_mean and latents_std that a config tells.")
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def text_encoder_config(shapes: Shapes, hints: Hints) -> Config:
    """Return sizes of umT5; all of them are in the shapes."""
    config: Config = {
        "vocab_size": size_of(shapes, "token_embedding.weight", 0),
        "dim": size_of(shapes, "token_embedding.weight", 1),
        "dim_attn": size_of(shapes, "blocks.0.attn.q.weight", 0),
        "dim_ffn": size_of(shapes, "blocks.0.ffn.fc1.weight", 0),
        "num_heads": size_of(shapes, "blocks.0.pos_embedding.embedding.weight", 1),
        "num_layers": count_of(shapes, "blocks."),
        "num_buckets": size_of(shapes, "blocks.0.pos_embedding.embedding.weight", 0),
    }
    hints.told(
        "text_encoder",
        config,
        {"d_model": "dim", "d_ff": "dim_ffn", "relative_attention_num_buckets": "num_buckets"},
    )
    return config


def image_encoder_config(shapes: Shapes, hints: Hints) -> Config:
    """Return sizes of the vision tower of CLIP."""
    dim = size_of(shapes, "visual.patch_embedding.weight", 0)
    patch = size_of(shapes, "visual.patch_embedding.weight", 2)
    tokens = size_of(shapes, "visual.pos_embedding", 1)
    sizes: Config = {
        "dim": dim,
        "patch_size": patch,
        "image_size": isqrt(tokens - 1) * patch,
        "num_layers": count_of(shapes, "visual.transformer."),
        "dim_ffn": size_of(shapes, "visual.transformer.0.mlp.0.weight", 0),
    }
    spellings = {"hidden_size": "dim", "intermediate_size": "dim_ffn", "num_hidden_layers": "num_layers",
                 "num_attention_heads": "num_heads"}  # fmt: skip
    sizes["num_heads"] = _heads(hints.told("image_encoder", sizes, spellings), dim, IMAGE_HEAD_SIZE, hints)
    return sizes


def audio_encoder_config(shapes: Shapes, hints: Hints) -> Config:
    """Return sizes of wav2vec2."""
    dim = size_of(shapes, "wav2vec2.feature_projection.projection.weight", 0)
    convs = "wav2vec2.feature_extractor.conv_layers."
    sizes: Config = {
        "dim": dim,
        "dim_ffn": size_of(shapes, "wav2vec2.encoder.layers.0.feed_forward.intermediate_dense.weight", 0),
        "num_layers": count_of(shapes, "wav2vec2.encoder.layers."),
        "conv_dim": tuple(
            size_of(shapes, f"{convs}{i}.conv.weight", 0) for i in range(count_of(shapes, convs))
        ),
        "conv_kernel": tuple(
            size_of(shapes, f"{convs}{i}.conv.weight", 2) for i in range(count_of(shapes, convs))
        ),
    }
    spellings = {"hidden_size": "dim", "intermediate_size": "dim_ffn", "num_hidden_layers": "num_layers",
                 "num_attention_heads": "num_heads"}  # fmt: skip
    sizes["num_heads"] = _heads(hints.told("audio_encoder", sizes, spellings), dim, AUDIO_HEAD_SIZE, hints)
    return sizes


def _heads(told: dict[str, object], dim: int, head_size: int, hints: Hints) -> int | None:
    heads = told.get("num_heads")
    if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0 and dim % heads == 0:
        return heads
    if dim % head_size:
        hints.lack(
            "num_heads",
            f"no shape tells it, and {dim} is no multiple of the usual head size {head_size}",
            "N",
        )
        return None
    hints.assume(f"num_heads is {dim // head_size}: heads of {head_size}, as in the released encoder.")
    return dim // head_size
