"""The networks that can stand in a Wan checkpoint. Tensor names are official; nothing heavy is imported.

Order matters: whole models that resemble a Wan DiT come before it, and a DiT before its adapters.
"""

from __future__ import annotations

from diffsynth.checkpoints import coder_sizes, dit_sizes
from diffsynth.checkpoints.architecture import Architecture

LATER = "A later version builds it."
NOT_PLANNED = "It is not one of the Wan models that this package runs."

_DIT_MARKS = (
    "patch_embedding.weight",
    "text_embedding.0.weight",
    "time_embedding.0.weight",
    "time_projection.1.weight",
    "blocks.0.self_attn.q.weight",
    "blocks.0.ffn.0.weight",
    "head.head.weight",
)

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        name="wan_video_dit",  # Wan-Dancer-14B
        title="Wan-Dancer, a DiT driven by music",
        part="dit",
        module=None,
        marks=("music_projection.weight", "patch_embedding.weight", "patch_embedding_global.weight"),
        owns=".",
        config=dit_sizes.dit_config,
        family="dancer",
        planned_in=NOT_PLANNED,
    ),
    Architecture(
        name="wan_video_dit",  # Video-As-Prompt-Wan2.1-14B
        title="Video-As-Prompt, a DiT with a second stream for a reference video",
        part="dit",
        module=None,
        marks=("patch_embedding.weight", "patch_embedding_mot_ref.weight"),
        owns=".",
        config=dit_sizes.dit_config,
        family="video-as-prompt",
        planned_in=NOT_PLANNED,
    ),
    Architecture(
        name="wan_video_dit",  # Wan2.2-Animate-2-14B
        title="Wan-Animate-2, a DiT whose blocks are wrapped once more",
        part="dit",
        module=None,
        marks=("patch_embedding.weight", "blocks.0.block.modulation"),
        owns=".",
        config=dit_sizes.animate2_config,
        family="animate-2",
        planned_in=NOT_PLANNED,
    ),
    Architecture(
        name="wan_video_dit",  # LongCat-Video
        title="LongCat-Video, which is not a Wan DiT",
        part="dit",
        module=None,
        marks=("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.y_proj.0.weight"),
        owns=".",
        config=dit_sizes.longcat_config,
        family="longcat",
        planned_in=NOT_PLANNED,
    ),
    Architecture(
        name="wan_video_dit",  # all of Wan2.1, Wan2.2 and Fun; the base of VACE, S2V and Animate
        title="Wan diffusion transformer",
        part="dit",
        module="diffsynth.models.wan.dit:WanDiT",
        marks=_DIT_MARKS,
        owns=r"(patch_embedding|text_embedding|time_embedding|time_projection|img_emb|head)\.|"
        r"blocks\.\d+\.(modulation$|self_attn\.|cross_attn\.|norm3\.|ffn\.[02]\.)",
        config=dit_sizes.dit_config,
        family=dit_sizes.dit_family,
    ),
    Architecture(
        name="wan_video_vace",  # Wan2.1-VACE-1.3B, -14B, VACE-Fun-A14B
        title="VACE adapter",
        part="vace",
        is_adapter=True,
        module="diffsynth.models.wan.adapters.vace:VaceAdapter",
        marks=("vace_patch_embedding.weight", "vace_blocks.0.before_proj.weight"),
        owns=r"vace_patch_embedding\.|vace_blocks\.\d+\.",
        config=dit_sizes.vace_config,
    ),
    Architecture(
        name="wan_video_reference_adapter",  # Fun-V1.1-Control, Fun-A14B-Control, Fun-5B-Control
        title="reference image adapter of Fun Control",
        part="reference",
        is_adapter=True,
        module="diffsynth.models.wan.adapters.reference:ReferenceAdapter",
        marks=("ref_conv.weight",),
        owns=r"ref_conv\.",
        config=dit_sizes.reference_config,
    ),
    Architecture(
        name="wan_video_camera_adapter",  # Fun-V1.1-Control-Camera, Fun-A14B- and Fun-5B-Control-Camera
        title="camera adapter of Fun Control-Camera",
        part="camera",
        is_adapter=True,
        module="diffsynth.models.wan.adapters.camera:CameraAdapter",
        marks=("control_adapter.conv.weight",),
        owns=r"control_adapter\.",
        config=dit_sizes.camera_config,
    ),
    Architecture(
        name="wan_video_speech_adapter",  # Wan2.2-S2V-14B
        title="speech adapter of S2V",
        part="speech",
        is_adapter=True,
        module=None,
        marks=("casual_audio_encoder.weights", "audio_injector.injector.0.q.weight", "cond_encoder.weight"),
        owns=r"casual_audio_encoder\.|audio_injector\.|cond_encoder\.|frame_packer\.|trainable_cond_mask\.",
        config=dit_sizes.speech_config,
        planned_in=LATER,
    ),
    Architecture(
        name="wan_video_animate_adapter",  # Wan2.2-Animate-14B
        title="pose and face adapter of Animate",
        part="animate",
        is_adapter=True,
        module=None,
        marks=("pose_patch_embedding.weight", "motion_encoder.dec.direction.weight"),
        owns=r"pose_patch_embedding\.|motion_encoder\.|face_encoder\.|face_adapter\.",
        config=dit_sizes.animate_config,
        planned_in=LATER,
    ),
    Architecture(
        name="wan_video_motion_controller",  # Wan2.1-1.3b-speedcontrol-v1
        title="speed adapter",
        part="speed",
        is_adapter=True,
        module="diffsynth.models.wan.adapters.speed:SpeedAdapter",
        marks=("linear.0.weight", "linear.2.weight", "linear.4.weight"),
        owns=r"linear\.",
        config=dit_sizes.motion_config,
        fits=dit_sizes.is_motion_controller,
    ),
    Architecture(
        name="wan_video_vae",  # Wan2.1_VAE: every 2.1 model, A14B, S2V, Animate
        title="Wan2.1 VAE",
        part="vae",
        module="diffsynth.models.wan.vae:WanVideoVAE",
        marks=(
            "encoder.downsamples.0.residual.2.weight",
            "decoder.upsamples.0.residual.2.weight",
            "conv2.weight",
        ),
        owns=r"(encoder|decoder|conv1|conv2)\.",
        config=coder_sizes.vae21_config,
    ),
    Architecture(
        name="wan_video_vae",  # Wan2.2_VAE: TI2V-5B, Fun-5B
        title="Wan2.2 VAE",
        part="vae",
        module="diffsynth.models.wan.vae22:WanVideoVAE22",
        marks=(
            "encoder.downsamples.0.downsamples.0.residual.2.weight",
            "decoder.upsamples.0.upsamples.0.residual.2.weight",
            "conv2.weight",
        ),
        owns=r"(encoder|decoder|conv1|conv2)\.",
        config=coder_sizes.vae22_config,
    ),
    Architecture(
        name="wan_video_text_encoder",  # models_t5_umt5-xxl-enc-bf16
        title="umT5 text encoder",
        part="text_encoder",
        module="diffsynth.models.wan.text_encoder:WanTextEncoder",
        marks=(
            "token_embedding.weight",
            "blocks.0.attn.q.weight",
            "blocks.0.ffn.fc1.weight",
            "blocks.0.pos_embedding.embedding.weight",
            "norm.weight",
        ),
        owns=r"token_embedding\.weight|norm\.weight|"
        r"blocks\.\d+\.(attn|norm1|norm2|ffn\.(?:gate|fc)\w*|pos_embedding)\.",
        config=coder_sizes.text_encoder_config,
    ),
    Architecture(
        name="wan_video_image_encoder",  # models_clip_open-clip-xlm-roberta-large-vit-huge-14
        title="Wan2.1 CLIP image encoder",
        part="image_encoder",
        module="diffsynth.models.wan.image_encoder:WanImageEncoder",
        marks=(
            "visual.cls_embedding",
            "visual.patch_embedding.weight",
            "visual.transformer.0.attn.to_qkv.weight",
        ),
        owns=r"visual\.|textual\.|log_scale",
        config=coder_sizes.image_encoder_config,
    ),
    Architecture(
        name="wan_video_audio_encoder",  # wav2vec2-large-xlsr-53-english, of S2V
        title="wav2vec2 audio encoder of S2V",
        part="audio_encoder",
        module=None,
        marks=(
            "wav2vec2.feature_projection.projection.weight",
            "wav2vec2.encoder.layers.0.attention.q_proj.weight",
        ),
        owns=r"wav2vec2\.|lm_head\.",
        config=coder_sizes.audio_encoder_config,
        planned_in=LATER,
    ),
)
