"""Writes the tables of training.md, from the code that they tell of: python docs/training_tables.py."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.full_size import DIT_1_3B, DIT_14B  # noqa: E402
from diffsynth.models.wan.dit import WanDiT  # noqa: E402
from diffsynth.training.config import TrainConfig  # noqa: E402
from diffsynth.training.config_table import table  # noqa: E402
from diffsynth.training.memory import TrainingChoice, num_lora_parameters, training_memory  # noqa: E402
from diffsynth.vram_management.activations import Workload  # noqa: E402
from diffsynth.vram_management.layers import layers_of_module, sizes_of  # noqa: E402
from diffsynth.vram_management.rates import DiTSizes  # noqa: E402

PAGE = ROOT / "docs" / "training.md"
CLIP = Workload(height=480, width=832, num_frames=81, num_branches=1)
RANK = 16
GB = 1e9
CHOICES: tuple[tuple[str, dict[str, object]], ...] = (
    ("`gradient_checkpointing: none`", {"checkpointing": "none"}),
    ("`gradient_checkpointing: keep_attention`", {"checkpointing": "keep_attention"}),
    ("`gradient_checkpointing: full`", {}),
    ("`full`, `offload: true`", {"is_offloaded": True}),
    ("`full`, `offload: true`, `stream: true`", {"is_offloaded": True, "num_slots": 2}),
)


def predicted(sizes: Mapping[str, object], *, whole: bool = False, **choice: object) -> tuple[float, float]:
    """GB on the device and on the host, of one step."""
    with torch.device("meta"):
        dit = WanDiT.from_config(sizes).to(torch.bfloat16)
    own, size = DiTSizes.from_config(sizes), sizes_of(layers_of_module("dit", dit))["dit"]
    trained = size.num_parameters if whole else num_lora_parameters(own, RANK)
    chosen = TrainingChoice(num_trained=trained, trains_whole=whole, **choice)  # type: ignore[arg-type]
    memory = training_memory(own, size, CLIP, chosen)
    return memory.device / GB, memory.host / GB


def memory_table() -> str:
    """What a step takes, by the settings that save memory."""
    lines = ["| settings of `memory` | 1.3B, GPU | 14B, GPU | 14B, pinned host |", "|---|---|---|---|"]
    for name, choice in CHOICES:
        small, (large, host) = predicted(DIT_1_3B, **choice)[0], predicted(DIT_14B, **choice)
        lines.append(f"| {name} | {small:.1f} | {large:.1f} | {host:.1f} |")
    full = predicted(DIT_1_3B, whole=True)[0]
    lines.append(f"| `gradient_checkpointing: full`, and `tune.kind: full` | {full:.1f} | | |")
    return "\n".join(lines)


TABLES = {"memory": memory_table, "settings": lambda: table(TrainConfig)}


def with_tables(page: str) -> str:
    """The page with every table as it must be, each between its two marks."""
    for name, made in TABLES.items():
        begin, end = f"<!-- {name}: python docs/training_tables.py -->\n", f"\n<!-- end of {name} -->"
        before, found, rest = page.partition(begin)
        _, ends, after = rest.partition(end)
        assert found and ends, f"{PAGE} has lost the marks of {name}"
        page = before + begin + made() + end + after
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
