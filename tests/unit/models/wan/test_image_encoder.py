"""The image encoder reads only what it computes with, and refuses sizes that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.errors import ConfigurationError, IncompleteCheckpointError
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan.image_encoder import ImageEncoderConfig, WanImageEncoder, preprocess
from tests.golden_recipe import recipe_state_dict

SIZES = ImageEncoderConfig(image_size=28, dim=32, dim_ffn=64, num_heads=2, num_layers=3)
HEADS = {"config": '{"num_heads": 2}'}
NAME = "wan_video_image_encoder"


def official() -> dict[str, torch.Tensor]:
    """Tensors as the official file has them: also the last layer, what follows it, and the text tower."""
    shapes = {name: tuple(t.shape) for name, t in WanImageEncoder(SIZES).state_dict().items()}
    last = {
        name.replace("transformer.1.", "transformer.2."): shape
        for name, shape in shapes.items()
        if "transformer.1." in name
    }
    others = {
        "visual.post_norm.weight": (32,), "visual.post_norm.bias": (32,), "visual.head": (32, 16),
        "textual.model.embeddings.weight": (50, 8), "log_scale": (1,),
    }  # fmt: skip
    return recipe_state_dict({**shapes, **last, **others})


def load(weights: dict[str, torch.Tensor], file: Path) -> WanImageEncoder:
    save_file(weights, file, HEADS)
    network = ModelManager(torch_dtype=torch.float32, device="cpu").load_models([file]).fetch_model(NAME)
    assert isinstance(network, WanImageEncoder)
    return network


def test_the_text_tower_and_the_last_layer_are_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    tensor = Checkpoint.tensor

    def counted(self: Checkpoint, name: str, *rest: object) -> torch.Tensor:
        read.append(name)
        return tensor(self, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    network = load(official(), tmp_path / "clip.safetensors")
    assert set(read) == set(network.state_dict()) and len(network.blocks) == 2
    assert not [
        n for n in read if n.startswith(("textual.", "log_scale", "visual.transformer.2.", "visual.he"))
    ]


def test_files_without_the_parts_behind_load_with_the_same_weights(tmp_path: Path) -> None:
    full, bare = official(), {n: t for n, t in official().items() if n.startswith("visual.")}
    bare = {n: t for n, t in bare.items() if "head" not in n and "post_norm" not in n}
    picture = torch.rand(1, 3, 20, 36) * 2 - 1
    features = [load(w, tmp_path / f"{len(w)}.safetensors")([picture]) for w in (full, bare)]
    assert torch.equal(*features) and features[0].shape == (1, 5, 32)


def test_a_missing_layer_is_told(tmp_path: Path) -> None:
    weights = {n: t for n, t in official().items() if n != "visual.transformer.1.norm2.bias"}
    with pytest.raises(IncompleteCheckpointError, match=r"visual\.transformer\.1\.norm2\.bias"):
        load(weights, tmp_path / "clip.safetensors")


def test_pictures_of_unequal_sizes_are_each_seen_as_if_alone() -> None:
    network = WanImageEncoder(SIZES)
    network.load_state_dict(recipe_state_dict({n: tuple(t.shape) for n, t in network.state_dict().items()}))
    pictures = [torch.rand(1, 3, 20, 36) * 2 - 1, torch.rand(1, 3, 40, 30) * 2 - 1]
    with torch.no_grad():
        both = network(pictures)
        torch.testing.assert_close(both[1:], network(pictures[1:]), rtol=0, atol=1e-5)  # order of sums
    assert preprocess(pictures[1], 28).shape == (1, 3, 28, 28)


@pytest.mark.parametrize(
    ("wrong", "words"), [({"num_layers": 1}, "has 1 layers"), ({"num_heads": 3}, "into 3 heads")]
)
def test_impossible_sizes_are_told(wrong: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        ImageEncoderConfig(dim=32, **wrong)
