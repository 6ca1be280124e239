"""What a training step takes on the device and on the host, before anything is loaded: arithmetic alone.

Letters: B batch, L tokens, D width, u the bytes of one stream of tokens, B x L x D in the compute dtype.
Counted after the code that allocates: what autograd keeps of one block (``ops/fused.py``, ``blocks.py``,
measured on toys: a test holds the constants equal), what waits for the backward pass (`recompute`,
`offload`), and the tensors that train with their gradients and moments (`tuning`, `masters`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffsynth.errors import ArgumentError
from diffsynth.vram_management.activations import FLOAT32, WORKSPACE_BYTES, Workload
from diffsynth.vram_management.layers import DTYPE_BYTES, NetworkSize
from diffsynth.vram_management.rates import DiTSizes

# u of one block that its backward pass needs, besides the feed-forward layer's hidden numbers
KEPT_OF_BLOCK = {"factors": 15, "whole": 17}
KEPT_OF_HIDDEN = 2  # times the hidden numbers of the feed-forward layer: before and after its GELU
IN_PASSING = 4  # u: gradients of a stream and a float32 piece on the way
TEXT_DIM, TIME_DIM = 4096, 256  # of umT5-XXL, and of the sines that a timestep becomes
OFFLOADED_STAY = 4  # u: inputs that leave, come back and are in use, with offload

Checkpointing = Literal["none", "full", "keep_attention"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingChoice:
    """What of a training run decides its memory."""

    num_trained: int  # numbers that train
    trains_whole: bool = False  # whole tensors train (full, parts), and not factors beside them
    trained_bytes: int = FLOAT32  # of each of them and of its gradient; 2 under stochastic rounding
    moment_bytes: int = 2 * FLOAT32  # the optimizer's, of each number that trains; AdamW has two in float32
    checkpointing: Checkpointing = "full"
    is_offloaded: bool = False  # inputs of blocks wait on the host
    num_slots: int = 0  # of streamed blocks; 0: all weights are on the device

    def __post_init__(self) -> None:
        if self.num_slots and self.checkpointing == "none":
            raise ArgumentError(
                "Streamed weights come back for the backward pass with gradient checkpointing alone; give "
                "checkpointing 'full' or 'keep_attention'."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMemory:
    """Bytes of one step at its fullest."""

    weights: int  # on the device, frozen
    trained: int  # with gradients and moments
    checkpoints: int  # what waits for the backward pass
    block: int  # one block as its backward pass needs it, and what is made in passing
    host: int  # pinned: streamed weights and offloaded inputs

    @property
    def device(self) -> int:
        """All of it that is on the device."""
        return self.weights + self.trained + self.checkpoints + self.block


def num_lora_parameters(dit: DiTSizes, rank: int) -> int:
    """Numbers of a LoRA on q, k, v, o of both attentions and both layers of the feed-forward, every block."""
    return dit.num_layers * rank * (8 * 2 * dit.dim + 2 * (dit.dim + dit.ffn_dim))


def size_of_dit(dit: DiTSizes) -> NetworkSize:
    """Weigh a DiT in bfloat16 by its sizes, where no header is at hand; norms and biases are left out."""
    blocks = dit.num_layers * (8 * dit.dim**2 + 2 * dit.dim * dit.ffn_dim)  # two attentions, feed-forward
    rest = 8 * dit.dim**2 + (TEXT_DIM + TIME_DIM) * dit.dim  # embeddings of text and time, modulation
    num_bytes = (blocks + rest) * DTYPE_BYTES["BF16"]
    return NetworkSize(
        name="dit", num_parameters=blocks + rest, num_bytes=num_bytes, unmapped_bytes=0, blocks=(),
        rest_parameters=rest, rest_bytes=rest * DTYPE_BYTES["BF16"], table_bytes=0, fp8_parameters=0,
    )  # fmt: skip


def training_memory(
    dit: DiTSizes, size: NetworkSize, work: Workload, choice: TrainingChoice
) -> TrainingMemory:
    """Predict one step.

    Args:
        dit: sizes of the DiT.
        size: its tensors, added up, as they are stored (fp8 counts a byte).
        work: the clip and the batch; ``num_branches`` is 1 in training.
        choice: what trains, and how memory is saved.
    """
    u = work.batch * work.tokens(dit) * dit.dim * work.element_bytes
    kept = KEPT_OF_BLOCK["whole" if choice.trains_whole else "factors"]
    block = round(u * (kept + KEPT_OF_HIDDEN * dit.ffn_dim / dit.dim))
    waiting = {"none": 0, "full": 1, "keep_attention": 2}[choice.checkpointing]
    if choice.checkpointing == "none":
        checkpoints = (dit.num_layers - 1) * block
    elif choice.is_offloaded:
        checkpoints = ((waiting - 1) * dit.num_layers + OFFLOADED_STAY) * u
    else:
        checkpoints = waiting * dit.num_layers * u
    frozen = size.num_bytes if not choice.trains_whole else 0
    slot = max((one.slot_bytes for one in size.blocks), default=0)
    widened = size.widened_parameters(work.device) * work.element_bytes
    weights = size.rest_bytes + choice.num_slots * slot if choice.num_slots else frozen
    host = sum(one.slot_bytes for one in size.blocks) if choice.num_slots else 0
    return TrainingMemory(
        weights=weights + widened,
        trained=choice.num_trained * (2 * choice.trained_bytes + choice.moment_bytes),
        checkpoints=checkpoints,
        block=block + IN_PASSING * u + WORKSPACE_BYTES[work.device],
        host=host + (dit.num_layers * u if choice.is_offloaded else 0),
    )
