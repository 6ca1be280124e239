"""How the networks of a pipeline are made to rest where toys would not by themselves."""

from __future__ import annotations

from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.vram_management.arrange import HOST_RESERVE_BYTES
from tests.fake_cuda.controls import GIB

SHARE = 0.9  # of what all blocks take: less than all of them, more than two of each network


def read_through_a_ring(pipe: WanVideoPipeline) -> None:
    """Stream every block out of its file, through page-locked memory for two of them."""
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    assert pipe.memory_plan is not None
    held = SHARE * pipe.memory_plan.pinned_bytes
    pipe.enable_vram_management(
        num_persistent_param_in_dit=0, ram_limit=(HOST_RESERVE_BYTES["cuda"] + held) / GIB
    )
    assert pipe.memory_plan.networks["dit"].host == "ring"
