"""Names that other projects give to the tensors of Wan's networks, paired with the official ones.

Sources: diffusers ``scripts/convert_wan_to_diffusers.py`` (DiT, VAE), transformers UMT5 and CLIP. Mind the
swap:
diffusers' ``norm2`` is the official ``norm3``; official ``norm1`` and ``norm2`` have no parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from diffsynth.checkpoints.layout import KeyLayout, Row

_DIT = (
    Row("{b}.self_attn.{qkv}.{p}", "{b}.attn1.to_{qkv}.{p}"),
    Row("{b}.self_attn.o.{p}", "{b}.attn1.to_out.0.{p}"),
    Row("{b}.self_attn.norm_{qk}.weight", "{b}.attn1.norm_{qk}.weight"),
    Row("{b}.cross_attn.{qkv}.{p}", "{b}.attn2.to_{qkv}.{p}"),
    Row("{b}.cross_attn.o.{p}", "{b}.attn2.to_out.0.{p}"),
    Row("{b}.cross_attn.norm_{qk}.weight", "{b}.attn2.norm_{qk}.weight"),
    Row("{b}.cross_attn.{kv}_img.{p}", "{b}.attn2.add_{kv}_proj.{p}"),
    Row("{b}.cross_attn.norm_k_img.weight", "{b}.attn2.norm_added_k.weight"),
    Row(None, "{b}.attn2.norm_added_q.weight"),  # in files of March 2025, read by no release since
    Row("{b}.norm3.{p}", "{b}.norm2.{p}"),
    Row("{b}.ffn.0.{p}", "{b}.ffn.net.0.proj.{p}"),
    Row("{b}.ffn.2.{p}", "{b}.ffn.net.2.{p}"),
    Row("{b}.modulation", "{b}.scale_shift_table"),
    Row("{v}.before_proj.{p}", "{v}.proj_in.{p}"),
    Row("{v}.after_proj.{p}", "{v}.proj_out.{p}"),
    Row("text_embedding.0.{p}", "condition_embedder.text_embedder.linear_1.{p}"),
    Row("text_embedding.2.{p}", "condition_embedder.text_embedder.linear_2.{p}"),
    Row("time_embedding.0.{p}", "condition_embedder.time_embedder.linear_1.{p}"),
    Row("time_embedding.2.{p}", "condition_embedder.time_embedder.linear_2.{p}"),
    Row("time_projection.1.{p}", "condition_embedder.time_proj.{p}"),
    Row("img_emb.proj.0.{p}", "condition_embedder.image_embedder.norm1.{p}"),
    Row("img_emb.proj.1.{p}", "condition_embedder.image_embedder.ff.net.0.proj.{p}"),
    Row("img_emb.proj.3.{p}", "condition_embedder.image_embedder.ff.net.2.{p}"),
    Row("img_emb.proj.4.{p}", "condition_embedder.image_embedder.norm2.{p}"),
    Row("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    Row("head.head.{p}", "proj_out.{p}"),
    Row("head.modulation", "scale_shift_table"),
)
_ANIMATE = (
    Row("motion_encoder.enc.fc.{n}.{p}", "motion_encoder.motion_network.{n}.{p}"),
    Row("motion_encoder.dec.direction.weight", "motion_encoder.motion_synthesis_weight"),
    Row("motion_encoder.enc.net_app.convs.0.0.weight", "motion_encoder.conv_in.weight"),
    Row("motion_encoder.enc.net_app.convs.0.1.bias", "motion_encoder.conv_in.act_fn.bias", ones=(1, 2)),
    Row(
        "motion_encoder.enc.net_app.convs.{m+1}.conv1.0.weight", "motion_encoder.res_blocks.{m}.conv1.weight"
    ),
    Row(
        "motion_encoder.enc.net_app.convs.{m+1}.conv1.1.bias",
        "motion_encoder.res_blocks.{m}.conv1.act_fn.bias",
        ones=(1, 2),
    ),
    Row(
        "motion_encoder.enc.net_app.convs.{m+1}.conv2.1.weight", "motion_encoder.res_blocks.{m}.conv2.weight"
    ),
    Row(
        "motion_encoder.enc.net_app.convs.{m+1}.conv2.2.bias",
        "motion_encoder.res_blocks.{m}.conv2.act_fn.bias",
        ones=(1, 2),
    ),
    Row(
        "motion_encoder.enc.net_app.convs.{m+1}.skip.1.weight",
        "motion_encoder.res_blocks.{m}.conv_skip.weight",
    ),
    Row(
        "motion_encoder.enc.net_app.convs.{m+1}.conv2.0.kernel", None
    ),  # fixed blur kernels, computed by others
    Row("motion_encoder.enc.net_app.convs.{m+1}.skip.0.kernel", None),
    Row("motion_encoder.enc.net_app.convs.8.weight", "motion_encoder.conv_out.weight"),
    Row("face_encoder.{123}.conv.{p}", "face_encoder.{123}.{p}"),
    Row(
        "face_adapter.fuser_blocks.{n}.linear1_kv.{p}",
        ("face_adapter.{n}.to_k.{p}", "face_adapter.{n}.to_v.{p}"),
    ),
    Row("face_adapter.fuser_blocks.{n}.linear1_q.{p}", "face_adapter.{n}.to_q.{p}"),
    Row("face_adapter.fuser_blocks.{n}.linear2.{p}", "face_adapter.{n}.to_out.{p}"),
    Row("face_adapter.fuser_blocks.{n}.{qk}_norm.weight", "face_adapter.{n}.norm_{qk}.weight"),
)
DIFFUSERS_DIT = KeyLayout("diffusers", ("condition_embedder.time_proj.weight",), _DIT + _ANIMATE)

UMT5 = KeyLayout(
    "diffusers",
    ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    (
        Row("token_embedding.weight", "shared.weight"),
        Row("token_embedding.weight", "encoder.embed_tokens.weight"),  # the same tensor, saved twice by some
        Row("norm.weight", "encoder.final_layer_norm.weight"),
        Row("blocks.{n}.attn.{qkvo}.weight", "encoder.block.{n}.layer.0.SelfAttention.{qkvo}.weight"),
        Row(
            "blocks.{n}.pos_embedding.embedding.weight",
            "encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        Row("blocks.{n}.norm1.weight", "encoder.block.{n}.layer.0.layer_norm.weight"),
        Row("blocks.{n}.norm2.weight", "encoder.block.{n}.layer.1.layer_norm.weight"),
        Row("blocks.{n}.ffn.gate.0.weight", "encoder.block.{n}.layer.1.DenseReluDense.wi_0.weight"),
        Row("blocks.{n}.ffn.fc1.weight", "encoder.block.{n}.layer.1.DenseReluDense.wi_1.weight"),
        Row("blocks.{n}.ffn.fc2.weight", "encoder.block.{n}.layer.1.DenseReluDense.wo.weight"),
    ),
)

_VAE_ENDS = (
    Row("conv1.{p}", "quant_conv.{p}"),
    Row("conv2.{p}", "post_quant_conv.{p}"),
    Row("{side}.conv1.{p}", "{side}.conv_in.{p}"),
    Row("{side}.head.0.gamma", "{side}.norm_out.gamma"),
    Row("{side}.head.2.{p}", "{side}.conv_out.{p}"),
    Row("{side}.middle.1.{attention}", "{side}.mid_block.attentions.0.{attention}"),
)
_RESIDUAL = (
    ("residual.0.gamma", "norm1.gamma"),
    ("residual.2.{p}", "conv1.{p}"),
    ("residual.3.gamma", "norm2.gamma"),
    ("residual.6.{p}", "conv2.{p}"),
    ("shortcut.{p}", "conv_shortcut.{p}"),
)


def _vae(marks: tuple[str, ...], blocks: dict[str, str], samplers: dict[str, str]) -> KeyLayout:
    both = {
        "{side}.middle.0": "{side}.mid_block.resnets.0",
        "{side}.middle.2": "{side}.mid_block.resnets.1",
        **blocks,
    }
    rows = [Row(f"{ours}.{a}", f"{theirs}.{b}") for ours, theirs in both.items() for a, b in _RESIDUAL]
    rows += [Row(f"{ours}.{{sample}}", f"{theirs}.{{sample}}") for ours, theirs in samplers.items()]
    return KeyLayout("diffusers", marks, _VAE_ENDS + tuple(rows), stride=_blocks_per_stage)


_FIRST_STAGE = re.compile(
    r"decoder\.(?:up_blocks\.0\.resnets\.(\d+)\.norm1\.gamma"  # diffusers, both VAEs: last residual block
    r"|upsamples\.0\.upsamples\.(\d+)\.residual\.0\.gamma"  # official 2.2: last residual block
    r"|upsamples\.(\d+)\.resample\.1\.weight)"  # official 2.1: the first up-sampler ends the first stage
)


def _blocks_per_stage(names: Iterable[str]) -> int:
    """Residual blocks of a decoder stage and its up-sampler: num_res_blocks + 2."""
    found = [match.groups() for name in names if (match := _FIRST_STAGE.fullmatch(name))]
    residual = [int(a or b or 0) + 2 for a, b, flat in found if flat is None]
    flat = [int(flat) + 1 for _, _, flat in found if flat is not None]
    return max(residual) if residual else min(flat, default=4)


DIFFUSERS_VAE21 = _vae(
    ("quant_conv.weight", "encoder.down_blocks.0.norm1.gamma"),
    {
        "encoder.downsamples.{n}": "encoder.down_blocks.{n}",
        "decoder.upsamples.{i*s+j}": "decoder.up_blocks.{i}.resnets.{j}",
    },
    {
        "encoder.downsamples.{n}": "encoder.down_blocks.{n}",
        "decoder.upsamples.{i*s+s-1}": "decoder.up_blocks.{i}.upsamplers.0",
    },
)
DIFFUSERS_VAE22 = _vae(
    ("quant_conv.weight", "encoder.down_blocks.0.resnets.0.norm1.gamma"),
    {
        "encoder.downsamples.{i}.downsamples.{j}": "encoder.down_blocks.{i}.resnets.{j}",
        "decoder.upsamples.{i}.upsamples.{j}": "decoder.up_blocks.{i}.resnets.{j}",
    },
    {
        "encoder.downsamples.{i}.downsamples.{s-2}": "encoder.down_blocks.{i}.downsampler",
        "decoder.upsamples.{i}.upsamples.{s-1}": "decoder.up_blocks.{i}.upsampler",
    },
)


def _clip_vision(prefix: str) -> KeyLayout:
    """Return the layout of transformers' CLIPVisionModel, whose names begin with ``prefix``."""
    layer = f"{prefix}encoder.layers.{{n}}"
    return KeyLayout(
        "diffusers",
        (f"{prefix}embeddings.class_embedding",),
        (
            Row("visual.cls_embedding", f"{prefix}embeddings.class_embedding", ones=(2, 0)),
            Row("visual.pos_embedding", f"{prefix}embeddings.position_embedding.weight", ones=(1, 0)),
            Row(None, f"{prefix}embeddings.position_ids"),  # a counting row in old files
            Row("visual.patch_embedding.weight", f"{prefix}embeddings.patch_embedding.weight"),
            Row("visual.pre_norm.{p}", f"{prefix}pre_layrnorm.{{p}}"),
            Row("visual.post_norm.{p}", f"{prefix}post_layernorm.{{p}}"),
            Row("visual.head", "visual_projection.weight", transposed=True),
            Row("visual.transformer.{n}.norm{12}.{p}", f"{layer}.layer_norm{{12}}.{{p}}"),
            Row(
                "visual.transformer.{n}.attn.to_qkv.{p}",
                tuple(f"{layer}.self_attn.{letter}_proj.{{p}}" for letter in "qkv"),
            ),
            Row("visual.transformer.{n}.attn.proj.{p}", f"{layer}.self_attn.out_proj.{{p}}"),
            Row("visual.transformer.{n}.mlp.0.{p}", f"{layer}.mlp.fc1.{{p}}"),
            Row("visual.transformer.{n}.mlp.2.{p}", f"{layer}.mlp.fc2.{{p}}"),
            Row("textual.{any}", None),
            Row("log_scale", None),
        ),
    )


HF_CLIP_VISION = _clip_vision("vision_model.")
HF_CLIP_VISION_BARE = _clip_vision("")  # as transformers 5 writes a model that it made itself

LAYOUTS = (DIFFUSERS_DIT, DIFFUSERS_VAE21, DIFFUSERS_VAE22, UMT5, HF_CLIP_VISION, HF_CLIP_VISION_BARE)
