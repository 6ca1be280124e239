"""Sizes and family of a diffusion transformer, read from names and shapes.

z is the number of latent channels (``out_dim``). What the first layer takes beside the noise names the
inputs: in_dim - out_dim = 0 nothing, z image, z + 4 mask and image, 2 z control and image, 2 z + 4 control,
mask and image.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt, prod

from diffsynth.checkpoints.hints import Hints, Shapes, count_of, size_of
from diffsynth.errors import ConfigurationError

HEAD_SIZE = 128  # in every Wan DiT; RoPE splits it in 44 + 42 + 42
TEXT_LEN = 512
EPS = 1e-6
S2V_INJECT_LAYERS = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)  # official config of S2V-14B
SPELLINGS = {  # of diffusers and VideoX-Fun
    "num_attention_heads": "num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "hidden_size": "dim",
    "pos_embed_seq_len": "image_tokens_pos",
    "vace_in_channels": "vace_in_dim",
}
Config = dict[str, object]


def dit_config(shapes: Shapes, hints: Hints) -> Config:
    """Return all that WanDiT needs."""
    dim, in_dim = size_of(shapes, "patch_embedding.weight", 0), size_of(shapes, "patch_embedding.weight", 1)
    size_of(shapes, "patch_embedding.weight", 4)
    patch_size = shapes["patch_embedding.weight"][2:]
    rows = size_of(shapes, "head.head.weight", 0)
    if rows % prod(patch_size):
        raise ConfigurationError(
            f"head.head.weight has {rows} rows, which do not divide into patches of {patch_size}; this is no "
            "Wan DiT."
        )
    image_dim = shapes["img_emb.proj.1.weight"][1] if "img_emb.proj.1.weight" in shapes else None
    sizes: Config = {
        "dim": dim,
        "in_dim": in_dim,
        "out_dim": rows // prod(patch_size),
        "ffn_dim": size_of(shapes, "blocks.0.ffn.0.weight", 0),
        "num_layers": count_of(shapes, "blocks."),
        "freq_dim": size_of(shapes, "time_embedding.0.weight", 1),
        "text_dim": size_of(shapes, "text_embedding.0.weight", 1),
        "patch_size": patch_size,
        "image_dim": image_dim,
        "image_tokens_pos": size_of(shapes, "img_emb.emb_pos", 1) if "img_emb.emb_pos" in shapes else None,
    }
    told = hints.told("dit", _sizes_that_documents_name(sizes, shapes), SPELLINGS)
    sizes["num_heads"] = heads_of(told, dim, hints, _head_size_in_shapes(shapes))
    sizes["text_len"] = _number(told, "text_len", TEXT_LEN, int, hints)
    sizes["eps"] = _number(told, "eps", EPS, float, hints)
    sizes["qk_norm"] = "blocks.0.self_attn.norm_q.weight" in shapes
    sizes["cross_attn_norm"] = "blocks.0.norm3.weight" in shapes
    return sizes


def _sizes_that_documents_name(sizes: Config, shapes: Shapes) -> Config:
    """All sizes, except that a document may count channels of an absent image branch (``image_dim``)."""
    named = {key: value for key, value in sizes.items() if value is not None}
    if "vace_patch_embedding.weight" in shapes:
        named["vace_in_dim"] = size_of(shapes, "vace_patch_embedding.weight", 1)
    return named


def _head_size_in_shapes(shapes: Shapes) -> int | None:
    norm = shapes.get("face_adapter.fuser_blocks.0.q_norm.weight")  # Animate alone shows it
    return norm[0] if norm else None


def heads_of(told: Mapping[str, object], dim: int, hints: Hints, head_size: int | None = None) -> int | None:
    """Return the number of attention heads, or None and a note of what is missing."""
    heads = told.get("num_heads")
    if heads is None and head_size and dim % head_size == 0:
        return dim // head_size
    if heads is None:
        if dim % HEAD_SIZE:
            hints.lack(
                "num_heads",
                f"no shape tells it, and dim {dim} is no multiple of the usual head size {HEAD_SIZE}",
                "N",
            )
            return None
        hints.assume(f"num_heads is {dim // HEAD_SIZE}: heads of {HEAD_SIZE}, as in every released Wan.")
        return dim // HEAD_SIZE
    if (
        not isinstance(heads, int)
        or isinstance(heads, bool)
        or heads < 1
        or dim % heads
        or (dim // heads) % 2
    ):
        hints.lack(
            "num_heads",
            f"it is given as {heads!r}, which does not divide dim {dim} into heads of even size",
            "N",
        )
        return None
    return heads


def _number(told: Mapping[str, object], key: str, usual: float, kind: type, hints: Hints) -> object:
    value = told.get(key)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 and kind(value) == value:
        return kind(value)
    hints.assume(f"{key} is {usual}, as in every released Wan.")
    return usual


def dit_family(shapes: Shapes, hints: Hints, config: Mapping[str, object]) -> str:
    """Return which of the Wan DiTs this is: "t2v", "i2v", "vace", "fun-control" and so on."""
    for mark, family in (
        ("vace_patch_embedding.weight", "vace"),
        ("casual_audio_encoder.weights", "s2v"),
        ("pose_patch_embedding.weight", "animate"),
        ("control_adapter.conv.weight", "control-camera"),
        ("img_emb.emb_pos", "flf2v"),
    ):
        if mark in shapes:
            return family
    z, in_dim = config["out_dim"], config["in_dim"]
    assert isinstance(z, int) and isinstance(in_dim, int)
    extra = in_dim - z
    if extra == 0:
        # 48 latent channels are those of the Wan2.2 VAE; the DiT made for it holds given first frames clean
        return "ti2v" if z == 48 else "t2v"
    if extra in (z, z + 4):
        return "i2v"
    if extra in (2 * z, 2 * z + 4):
        return "fun-control"
    hints.assume(
        f"in_dim is {in_dim} and out_dim {z}: {extra} channels beside the noise are no known set of inputs, "
        "so this is taken for t2v, which leaves them empty."
    )
    return "t2v"


def every_nth(
    hints: Hints, key: str, count: int, num_layers: int | None, told: object
) -> tuple[int, ...] | None:
    """Return the layers at which ``count`` blocks join a DiT: as told, else evenly spaced."""
    if isinstance(told, tuple) and len(told) == count and all(isinstance(n, int) for n in told):
        return told
    if num_layers is None:
        hints.assume(f"{key}: evenly spaced over the layers of the DiT that it is used with.")
        return None
    if count == 0 or num_layers % count:
        hints.lack(key, f"{num_layers} layers do not divide evenly among {count} blocks", "[0, ...]")
        return None
    step = num_layers // count
    hints.assume(f"{key} is every {step}th layer from 0, as in every released Wan.")
    return tuple(range(0, num_layers, step))


def _layers_of_dit(shapes: Shapes) -> int | None:
    return count_of(shapes, "blocks.") or None


def vace_config(shapes: Shapes, hints: Hints) -> Config:
    """Return sizes of the VACE blocks; ``vace_layers`` None: a file of its own, to be spread over its DiT."""
    dim = size_of(shapes, "vace_patch_embedding.weight", 0)
    size_of(shapes, "vace_patch_embedding.weight", 4)
    num_blocks = count_of(shapes, "vace_blocks.")
    sizes: Config = {
        "dim": dim,
        "vace_in_dim": size_of(shapes, "vace_patch_embedding.weight", 1),
        "patch_size": shapes["vace_patch_embedding.weight"][2:],
        "ffn_dim": size_of(shapes, "vace_blocks.0.ffn.0.weight", 0),
        "num_vace_blocks": num_blocks,
    }
    num_layers = _layers_of_dit(shapes)
    known = sizes if num_layers is None else {**sizes, "num_layers": num_layers}
    told = hints.told("dit", known, SPELLINGS)
    if num_layers is None and isinstance(said := told.get("num_layers"), int):
        num_layers = said
    sizes["num_heads"] = heads_of(told, dim, hints)
    sizes["eps"] = _number(told, "eps", EPS, float, hints)
    sizes["vace_layers"] = every_nth(hints, "vace_layers", num_blocks, num_layers, told.get("vace_layers"))
    sizes["qk_norm"] = "vace_blocks.0.self_attn.norm_q.weight" in shapes
    sizes["cross_attn_norm"] = "vace_blocks.0.norm3.weight" in shapes
    return sizes


def speech_config(shapes: Shapes, hints: Hints) -> Config:
    """Return sizes of the audio side of S2V."""
    dim = size_of(shapes, "audio_injector.injector.0.q.weight", 0)
    count = count_of(shapes, "audio_injector.injector.")
    conv1 = "casual_audio_encoder.encoder.conv1_local.conv.weight"
    told = hints.told("dit", {"dim": dim}, SPELLINGS)
    layers = told.get("audio_inject_layers")
    if not (isinstance(layers, tuple) and len(layers) == count and all(isinstance(n, int) for n in layers)):
        layers = S2V_INJECT_LAYERS if count == len(S2V_INJECT_LAYERS) else None
        if layers is None:
            hints.lack(
                "audio_inject_layers",
                f"the file has {count} injectors, the rule knows {len(S2V_INJECT_LAYERS)}",
                "[0, ...]",
            )
        else:
            hints.assume(f"audio_inject_layers is {list(layers)}, as in S2V-14B.")
    return {
        "dim": dim,
        "num_heads": heads_of(told, dim, hints),
        "num_injectors": count,
        "audio_inject_layers": layers,
        "audio_dim": size_of(shapes, conv1, 1),
        "num_audio_layers": size_of(shapes, "casual_audio_encoder.weights", 1),
        "num_audio_tokens": size_of(shapes, conv1, 0)
        // size_of(shapes, "casual_audio_encoder.encoder.conv2.conv.weight", 1),
        "cond_dim": size_of(shapes, "cond_encoder.weight", 1),
        "enable_adain": "audio_injector.injector_adain_layers.0.linear.weight" in shapes,
        "enable_framepack": "frame_packer.proj.weight" in shapes,
    }


def animate_config(shapes: Shapes, hints: Hints) -> Config:
    """Return sizes of the pose and face side of Animate."""
    dim = size_of(shapes, "pose_patch_embedding.weight", 0)
    count = count_of(shapes, "face_adapter.fuser_blocks.")
    told = hints.told("dit", {"dim": dim}, SPELLINGS)
    return {
        "dim": dim,
        "num_heads": heads_of(told, dim, hints, _head_size_in_shapes(shapes)),
        "pose_dim": size_of(shapes, "pose_patch_embedding.weight", 1),
        "motion_dim": size_of(shapes, "motion_encoder.dec.direction.weight", 1),
        "style_dim": size_of(shapes, "motion_encoder.dec.direction.weight", 0),
        "num_face_adapters": count,
        "face_layers": every_nth(
            hints, "face_layers", count, _layers_of_dit(shapes), told.get("face_layers")
        ),
    }


def camera_config(shapes: Shapes, hints: Hints) -> Config:
    """Return sizes of the camera adapter: 24 numbers per pixel, f x f pixels folded into channels."""
    folded = size_of(shapes, "control_adapter.conv.weight", 1)
    downscale = isqrt(folded // 24)
    if 24 * downscale**2 != folded:
        hints.lack(
            "downscale", f"control_adapter.conv.weight takes {folded} channels, not 24 times a square", "8"
        )
    return {
        "dim": size_of(shapes, "control_adapter.conv.weight", 0),
        "in_dim": 24,
        "downscale": downscale,
        "kernel_size": shapes["control_adapter.conv.weight"][2:],
        "num_residual_blocks": count_of(shapes, "control_adapter.residual_blocks."),
    }


def reference_config(shapes: Shapes, hints: Hints) -> Config:
    """Return sizes of the reference adapter (one convolution)."""
    return {
        "dim": size_of(shapes, "ref_conv.weight", 0),
        "in_dim": size_of(shapes, "ref_conv.weight", 1),
        "kernel_size": shapes["ref_conv.weight"][2:],
    }


def motion_config(shapes: Shapes, hints: Hints) -> Config:
    """Return sizes of the speed adapter (three linear layers)."""
    return {"freq_dim": size_of(shapes, "linear.0.weight", 1), "dim": size_of(shapes, "linear.0.weight", 0)}


def is_motion_controller(shapes: Shapes) -> bool:
    """Tell the speed adapter from other stacks of linear layers: it makes six modulations of one width."""
    dim = size_of(shapes, "linear.0.weight", 0)
    return size_of(shapes, "linear.4.weight", 0) == 6 * dim and count_of(shapes, "linear.") == 5


def animate2_config(shapes: Shapes, hints: Hints) -> Config:
    """Return sizes of Animate-2, whose blocks stand one level deeper."""
    return dit_config({name.replace(".block.", ".", 1): shape for name, shape in shapes.items()}, hints)


def longcat_config(shapes: Shapes, hints: Hints) -> Config:
    """Return sizes of LongCat-Video, which is no Wan."""
    dim = size_of(shapes, "x_embedder.proj.weight", 0)
    patch_size = shapes["x_embedder.proj.weight"][2:]
    return {
        "dim": dim,
        "in_dim": size_of(shapes, "x_embedder.proj.weight", 1),
        "out_dim": size_of(shapes, "final_layer.linear.weight", 0) // max(1, prod(patch_size)),
        "ffn_dim": size_of(shapes, "blocks.0.ffn.w1.weight", 0),
        "num_layers": count_of(shapes, "blocks."),
        "num_heads": dim // size_of(shapes, "blocks.0.attn.q_norm.weight", 0),
        "freq_dim": size_of(shapes, "t_embedder.mlp.0.weight", 1),
        "text_dim": size_of(shapes, "y_embedder.y_proj.0.weight", 1),
        "patch_size": patch_size,
    }
