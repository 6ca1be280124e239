"""Runs the kernels that Inductor generates for `diffsynth.ops.fused` in Triton's interpreter; see the test.

A process of its own, for Triton reads TRITON_INTERPRET when it is imported. Inductor then hands each kernel
to the interpreter instead of compiling it, and the interpreter computes, on the CPU, what it copies from the
simulated GPU and back. So `fused` is called as on a GPU, and these are the numbers of its kernels.

Prints one JSON object: for each case the largest difference from the same call on the CPU, in steps of
bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffsynth.ops import compiled, fused
from diffsynth.ops.rope import video_rotation
from tests.fake_cuda import controls

CUDA = torch.device("cuda", 0)
EPS = 1e-6
# tokens, width, heads: a reduction at once with masks, and one in a loop as of a 14B DiT
SIZES = {"narrow": (80, 96, 3), "wide": (8, 5120, 40)}
REDUCTIONS = ("modulated norm, one time", "norm of heads", "norm of heads, turned")
Case = Callable[[torch.device], Tensor]


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for name, sizes in SIZES.items():
        found |= {
            f"{name} {what}": case for what, case in of_size(*sizes, is_narrow=name == "narrow").items()
        }
    return found


def of_size(length: int, width: int, heads: int, *, is_narrow: bool) -> dict[str, Case]:
    """Each kernel on the same inputs; changed ones are cloned."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, y = random(1, length, width).bfloat16(), random(1, length, width).bfloat16()
    weight = (1 + 0.1 * random(width)).bfloat16()
    rotation = video_rotation((1, 1, length), width // heads, torch.device("cpu"))
    shift, scale, gate = (random(1, 2, width) for _ in range(3))
    clocks = {"one time": None, "two times": (torch.arange(length) > length // 3).long()}
    clocks["a time per token"] = torch.arange(length) % 2  # more than `MAX_RUNS` runs: rows are gathered

    def norm(clock: Tensor | None, dtype: torch.dtype) -> Case:
        spans = fused.spans_of(clock, length)
        return lambda device: fused.modulated_layer_norm(
            x.to(device, dtype), shift.to(device), scale.to(device), spans, EPS
        )

    def add(clock: Tensor | None) -> Case:
        spans = fused.spans_of(clock, length)
        return lambda device: fused.gated_add(x.clone().to(device), y.to(device), gate.to(device), spans)

    def heads_of(gain: Tensor | None, turns: Tensor | None) -> Case:
        return lambda device: fused.rms_norm_heads(
            x.clone().to(device), None if gain is None else gain.to(device), EPS, heads,
            None if turns is None else turns.to(device),
        )  # fmt: skip

    every = {
        **{f"modulated norm, {name}": norm(clock, torch.bfloat16) for name, clock in clocks.items()},
        "modulated norm in float32, two times": norm(clocks["two times"], torch.float32),
        **{f"gated add, {name}": add(clock) for name, clock in clocks.items()},
        "norm of heads": heads_of(weight, None),
        "norm of heads, turned": heads_of(weight, rotation),
        "heads turned": heads_of(None, rotation),
    }
    return {name: every[name] for name in (every if is_narrow else REDUCTIONS)}


def steps_between(found: Tensor, expected: Tensor) -> float:
    """The largest difference in steps of bfloat16; below 2^-8 a step is what it is there."""
    magnitude = expected.float().abs().clamp(min=2**-8).log2().floor()
    step = torch.finfo(torch.bfloat16).eps * torch.exp2(magnitude)
    return float(((found.float() - expected.float()).abs() / step).max())


def mend_interpreter() -> None:
    """Give it what a kernel of Inductor asks for and it does not have."""
    import triton.language as tl
    from torch._inductor.runtime import triton_helpers
    from triton.runtime import interpreter

    # No libraries of CUDA: the same function of Triton's own, as it is inside a kernel.
    triton_helpers.libdevice.rsqrt = lambda x: tl.rsqrt(x)  # noqa: PLW0108  (another one there)
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: object, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # Triton 3.6 takes an array of one for the number in it, which NumPy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


@torch.no_grad()
def main() -> None:
    from tests.fake_cuda import answers  # noqa: F401  # outside of the runtime it would answer for a real GPU

    mend_interpreter()
    told: dict[str, float] = {}
    for name, case in cases().items():
        before = controls.counts()
        found = case(CUDA)
        assert not compiled.compiler.has_failed
        assert (controls.counts() - before).launches == 0, "not in the interpreter"
        told[name] = steps_between(found.cpu(), case(torch.device("cpu")))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
