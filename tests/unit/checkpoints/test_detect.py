from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.checkpoints.architecture import Match
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.detect import detect
from diffsynth.checkpoints.hints import role_of
from diffsynth.errors import ConfigurationError, LoRAFileError, UnknownCheckpointError
from diffsynth.models.registry import ARCHITECTURES
from tests.unit.checkpoints.weights import TOY_DIT, expected, manifests, toy_dit, write_sparse

MODELS = sorted(expected())


def detected(path: Path) -> list[Match]:
    return detect(Checkpoint.open(path), ARCHITECTURES)


def plain(value: object) -> object:
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def test_the_table_has_all_published_checkpoints() -> None:
    assert len(MODELS) == 56 and set(MODELS) == set(manifests())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["bare", "comfyui"])
@pytest.mark.parametrize("model", MODELS)
def test_a_published_header_is_recognised(model: str, prefix: str, tmp_path: Path) -> None:
    shapes = {prefix + name: shape for name, shape in manifests()[model].items()}
    told = expected()[model]
    matches = detected(write_sparse(tmp_path / "model.safetensors", shapes))
    assert [match.name for match in matches] == told["networks"]
    first = matches[0]
    assert first.family == told["family"]
    assert {key: plain(first.config.get(key)) for key in told.get("config", {})} == told.get("config", {})
    assert (
        sum(len(match.checkpoint) for match in matches) >= 0.6 * told["tensors"]
    )  # some layouts join tensors
    assert sum(match.parameters for match in matches) == told["parameters"]
    assert [match.left_over for match in matches] == [[] for _ in matches]
    assert [match.missing for match in matches] == [[] for _ in matches]
    own_prefix = "comfyui" if prefix else "official"
    assert first.layout == (
        own_prefix if told["layout"] == "official" else told["layout"] if not prefix else "comfyui+diffusers"
    )


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "module.model.", "_orig_mod.", "transformer.", "pipe.dit."]
)
def test_a_prefix_of_a_trainer_is_stripped(prefix: str, tmp_path: Path) -> None:
    shapes = {prefix + name: shape for name, shape in manifests()["wan2.1_t2v_1.3b"].items()}
    (match,) = detected(write_sparse(tmp_path / "model.safetensors", shapes))
    assert (match.name, match.family, match.prefix, match.layout) == (
        "wan_video_dit",
        "t2v",
        prefix,
        "official",
    )
    assert "patch_embedding.weight" in match.checkpoint.shapes


def test_networks_under_different_prefixes_of_one_file_are_all_found(tmp_path: Path) -> None:
    shapes = {
        **{f"model.diffusion_model.{name}": shape for name, shape in manifests()["wan2.1_t2v_1.3b"].items()},
        **{f"first_stage_model.{name}": shape for name, shape in manifests()["wan2.1_vae"].items()},
        **{
            f"text_encoders.umt5xxl.transformer.{n}": s
            for n, s in manifests()["diffusers_umt5_xxl_text_encoder"].items()
        },
    }
    matches = detected(write_sparse(tmp_path / "all_in_one.safetensors", shapes))
    assert [match.name for match in matches] == ["wan_video_dit", "wan_video_vae", "wan_video_text_encoder"]


@pytest.mark.parametrize(
    ("model", "key", "layers"),
    [
        ("wan2.1_vace_1.3b", "vace_layers", tuple(range(0, 30, 2))),
        ("wan2.1_vace_14b", "vace_layers", tuple(range(0, 40, 5))),
        ("wan2.2_s2v_14b", "audio_inject_layers", (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)),
        ("wan2.2_animate_14b", "face_layers", tuple(range(0, 40, 5))),
        ("diffusers_wan2.2_animate_14b_transformer", "face_layers", tuple(range(0, 40, 5))),
        ("wan2.1_vace_14b_module_only", "vace_layers", None),
    ],
)
def test_the_layers_of_an_adapter_follow_the_rule(
    model: str, key: str, layers: tuple[int, ...] | None, tmp_path: Path
) -> None:
    adapter = detected(write_sparse(tmp_path / "model.safetensors", manifests()[model]))[-1]
    assert adapter.config[key] == layers
    assert any(key in sentence for sentence in adapter.assumed)


@pytest.mark.parametrize(
    ("model", "downscale"),
    [("wan2.1_fun_v1.1_14b_control_camera", 8), ("wan2.2_fun_5b_control_camera", 16)],
)
def test_the_camera_adapter_tells_how_far_it_folds(model: str, downscale: int, tmp_path: Path) -> None:
    adapter = detected(write_sparse(tmp_path / "model.safetensors", manifests()[model]))[-1]
    assert adapter.config["downscale"] == downscale and adapter.config["in_dim"] == 24


# what no shape tells


def save_toy_dit(path: Path, metadata: dict[str, str] | None = None, **sizes: object) -> Path:
    save_file(toy_dit(**sizes).state_dict(), path, metadata=metadata)
    return path


def test_heads_that_no_rule_tells_are_missing_by_name(tmp_path: Path) -> None:
    (match,) = detected(save_toy_dit(tmp_path / "dit.safetensors"))
    assert match.config["num_heads"] is None and match.config["dim"] == 96
    with pytest.raises(ConfigurationError, match=r"num_heads is missing.*96.*config\.json.*\"num_heads\": N"):
        match.require_config()


@pytest.mark.parametrize("place", ["metadata", "dit.json", "dit.config.json", "config.json"])
@pytest.mark.parametrize(
    "config",
    [
        {"num_heads": 3, "text_len": 40, "eps": 1e-5},
        {
            **TOY_DIT,
            "num_heads": 3,
            "text_len": 40,
            "eps": 1e-5,
            "model_type": "t2v",
            "patch_size": [1, 2, 2],
        },
        {"num_attention_heads": 3, "attention_head_dim": 32, "in_channels": 16, "text_len": 40, "eps": 1e-5},
        {"dit": {"num_heads": 3, "text_len": 40, "eps": 1e-5, "dim": 96}, "vae": {"dim": 12, "num_heads": 7}},
    ],
    ids=["few-keys", "official", "diffusers", "nested"],
)
def test_heads_are_read_where_they_stand(place: str, config: dict[str, object], tmp_path: Path) -> None:
    metadata = {"config": json.dumps(config)} if place == "metadata" else None
    if metadata is None:
        (tmp_path / place).write_text(json.dumps(config))
    (match,) = detected(save_toy_dit(tmp_path / "dit.safetensors", metadata))
    assert match.require_config()["num_heads"] == 3
    assert match.config["text_len"] == 40 and match.config["eps"] == 1e-5
    assert match.assumed == []


def test_the_file_itself_is_believed_before_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 6, "text_len": 77}))
    (match,) = detected(save_toy_dit(tmp_path / "dit.safetensors", {"config": json.dumps({"num_heads": 3})}))
    assert match.config["num_heads"] == 3 and match.config["text_len"] == 77


@pytest.mark.parametrize(
    "wrong", [{"dim": 16}, {"num_layers": 4}, {"attention_head_dim": 16}, {"in_channels": 36}]
)
def test_a_config_that_contradicts_the_tensors_is_left_aside(wrong: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3, **wrong}))
    (match,) = detected(save_toy_dit(tmp_path / "dit.safetensors"))
    assert match.config["num_heads"] is None
    assert any("config.json was left aside" in sentence for sentence in match.assumed)


@pytest.mark.parametrize(
    "other",
    [
        {"d_model": 96, "num_heads": 3, "num_layers": 3, "vocab_size": 100},
        {"base_dim": 96, "z_dim": 16, "num_heads": 3},
        {"text_encoder": {"num_heads": 3, "dim": 96}},
    ],
    ids=["text-encoder", "vae", "nested-text-encoder"],
)
def test_a_config_of_another_network_is_not_used(other: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(other))
    (match,) = detected(save_toy_dit(tmp_path / "dit.safetensors"))
    assert match.config["num_heads"] is None
    assert not any("left aside" in sentence for sentence in match.assumed)


@pytest.mark.parametrize("heads", [0, -3, 5, 96, "3", True, 2.0])
def test_heads_that_cannot_be_are_refused(heads: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": heads}))
    (match,) = detected(save_toy_dit(tmp_path / "dit.safetensors"))
    with pytest.raises(ConfigurationError, match="num_heads"):
        match.require_config()


def test_an_unreadable_config_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    (match,) = detected(save_toy_dit(tmp_path / "dit.safetensors", {"config": "[1]"}))
    assert sum("no JSON object" in sentence for sentence in match.assumed) == 2


def test_blocks_that_do_not_divide_need_their_layers(tmp_path: Path) -> None:
    shapes = {name: tuple(t.shape) for name, t in toy_dit().state_dict().items()}
    shapes |= {
        f"vace_{name}": shape for name, shape in shapes.items() if name.startswith(("blocks.0", "blocks.1"))
    }
    shapes |= {"vace_patch_embedding.weight": (96, 96, 1, 2, 2), "vace_blocks.0.before_proj.weight": (96, 96)}
    config = {"num_heads": 3}
    path = tmp_path / "vace.safetensors"
    adapter = detected(write_sparse(path, shapes, metadata={"config": json.dumps(config)}))[1]
    with pytest.raises(
        ConfigurationError, match="vace_layers is missing: 3 layers do not divide evenly among 2"
    ):
        adapter.require_config()
    config["vace_layers"] = [0, 2]
    adapter = detected(write_sparse(path, shapes, metadata={"config": json.dumps(config)}))[1]
    assert adapter.require_config()["vace_layers"] == (0, 2)


def test_generation_defaults_of_a_file_are_handed_on(tmp_path: Path) -> None:
    metadata = {
        "config": json.dumps({"num_heads": 3}),
        "generation": json.dumps({"height": 64, "sigma_shift": 3.0}),
    }
    (match,) = detected(save_toy_dit(tmp_path / "a.safetensors", metadata))
    assert match.generation == {"height": 64, "sigma_shift": 3.0}
    inside = {"config": json.dumps({"num_heads": 3, "generation": {"num_frames": 17}})}
    (match,) = detected(save_toy_dit(tmp_path / "b.safetensors", inside))
    assert match.generation == {"num_frames": 17}


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("Wan2.2-T2V-A14B/high_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors", "high"),
        ("Wan2.2-T2V-A14B/low_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors", "low"),
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "high"),
        ("Wan2_2-I2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors", "low"),
        ("highres/model.safetensors", None),
        ("slow_motion.safetensors", None),
        ("high_vs_low.safetensors", None),
    ],
)
def test_the_path_says_which_expert(path: str, role: str | None) -> None:
    assert role_of((Path("/models") / path,), {}) == role


def test_diffusers_folders_say_which_expert(tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        (tmp_path / name).mkdir()
    paths = [(tmp_path / name / "model.safetensors",) for name in ("transformer", "transformer_2")]
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer_2": [None, None]}))
    assert [role_of(path, {}) for path in paths] == [None, None]
    (tmp_path / "model_index.json").write_text(
        json.dumps({"transformer_2": ["diffusers", "WanTransformer3DModel"]})
    )
    assert [role_of(path, {}) for path in paths] == ["high", "low"]


# what is no weight, and what is no model


def test_markers_and_old_norms_are_no_left_overs(tmp_path: Path) -> None:
    shapes = dict(manifests()["diffusers_wan2.1_i2v_14b_transformer"])
    shapes |= {f"blocks.{i}.attn2.norm_added_q.weight": (5120,) for i in range(40)}
    shapes |= {"model_type.Wan2_1-FLF2V-14B-720P": (1,)}
    (match,) = detected(write_sparse(tmp_path / "model.safetensors", shapes))
    assert match.left_over == [] and len(match.checkpoint) == 1303


def test_a_text_encoder_may_carry_its_tokenizer_and_its_embedding_twice(tmp_path: Path) -> None:
    shapes = dict(manifests()["diffusers_umt5_xxl_text_encoder"])
    shapes |= {"encoder.embed_tokens.weight": shapes["shared.weight"], "spiece_model": (4548313,)}
    (match,) = detected(write_sparse(tmp_path / "umt5.safetensors", shapes))
    assert match.left_over == [] and len(match.checkpoint) == 242
    assert match.attachments is not None and list(match.attachments.shapes) == ["spiece_model"]


def test_tensors_of_nobody_are_left_over(tmp_path: Path) -> None:
    shapes = {**manifests()["wan2.1_t2v_1.3b"], "blocks.0.cam_encoder.weight": (1536, 12), "extra": (3,)}
    (match,) = detected(write_sparse(tmp_path / "model.safetensors", shapes))
    assert match.left_over == ["blocks.0.cam_encoder.weight", "extra"]
    assert match.parameters == expected()["wan2.1_t2v_1.3b"]["parameters"]


def test_an_unknown_file_names_the_nearest_network(tmp_path: Path) -> None:
    shapes = {
        name: s for name, s in manifests()["wan2.1_t2v_1.3b"].items() if not name.startswith("patch_emb")
    }
    with pytest.raises(
        UnknownCheckpointError, match=r"wan_video_dit.*patch_embedding\.weight.*diffsynth inspect"
    ):
        detected(write_sparse(tmp_path / "model.safetensors", shapes))


@pytest.mark.parametrize(
    "shapes",
    [{}, {"weight": (3,)}, {"linear.0.weight": (2, 3), "linear.2.weight": (3, 2), "linear.4.weight": (5, 2)}],
)
def test_a_file_of_something_else_is_unknown(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    with pytest.raises(UnknownCheckpointError, match=f"holds {len(shapes)} tensors"):
        detected(write_sparse(tmp_path / "model.safetensors", shapes))


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.self_attn.q.lora_A.default.weight",
        "pipe.dit.blocks.0.self_attn.q.lora_B.default.weight",
        "diffusion_model.blocks.0.cross_attn.o.lora_down.weight",
        "transformer.blocks.0.attn1.to_q.lora_A.weight",
        "lora_unet_blocks_0_self_attn_q.lora_down.weight",
        "lora_unet__blocks_0_self_attn_q.alpha",
        "diffusion_model.blocks.0.ffn.0.lokr_w1",
        "diffusion_model.blocks.0.self_attn.norm_q.diff",
        "blocks.0.attn1.to_q.lora_A",
    ],
)
def test_a_lora_is_called_a_lora(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoRAFileError, match="load_lora"):
        detected(write_sparse(tmp_path / "lora.safetensors", {name: (4, 8)}))


def test_names_of_a_dit_with_other_shapes_are_refused(tmp_path: Path) -> None:
    shapes = dict(manifests()["wan2.1_t2v_1.3b"])
    shapes["patch_embedding.weight"] = (1536, 64)
    with pytest.raises(ConfigurationError, match=r"patch_embedding\.weight has shape"):
        detected(write_sparse(tmp_path / "model.safetensors", shapes))


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("dim", [12, 16])
def test_sizes_of_a_toy_vae_are_inferred(blocks: int, dim: int, tmp_path: Path) -> None:
    from diffsynth.models.wan.vae import VAEConfig, WanVideoVAE

    config = VAEConfig(
        dim=dim, num_res_blocks=blocks, dim_mult=(1, 2, 2, 3), temporal_downsample=(True, False, True)
    )
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in WanVideoVAE(config).state_dict().items()}
    (match,) = detected(write_sparse(tmp_path / "vae.safetensors", shapes))
    told = {
        key: match.config[key]
        for key in ("dim", "num_res_blocks", "dim_mult", "temporal_downsample", "z_dim")
    }
    assert told == {
        "dim": dim,
        "num_res_blocks": blocks,
        "dim_mult": (1, 2, 2, 3),
        "temporal_downsample": (True, False, True),
        "z_dim": 16,
    }


@pytest.mark.parametrize("number", ["999999", "1000000000", "9" * 5000])
def test_a_list_of_a_million_blocks_is_refused(number: str, tmp_path: Path) -> None:
    shapes = {
        **manifests()["diffusers_wan2.1_t2v_1.3b_transformer"],
        f"blocks.{number}.scale_shift_table": (1, 6, 1536),
    }
    path = write_sparse(tmp_path / "model.safetensors", shapes)
    if number == "999999":
        with pytest.raises(ConfigurationError, match=r"blocks\.999999, but only"):
            detected(path)
    else:
        assert detected(path)[0].config["num_layers"] == 30
