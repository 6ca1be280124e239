"""What may answer a step in place of the network: step caches such as TeaCache or EasyCache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from diffsynth.models.wan.probe import Probe
    from diffsynth.sampling.step import Step


@runtime_checkable
class StepCache(Protocol):
    """Remembers steps of one generation; a memory for each expert and side of the guidance.

    Letters: B batch, C latent channels, F H W latent frames, height, width; L tokens, D width. `repr` tells
    what decides its answers: a run goes on from saved steps only with a cache that reads the same.
    """

    def begin(self, count: int, sides: int) -> None:
        """Forget everything: a generation of ``count`` steps begins, or weights have changed on its way."""
        ...

    def answer(self, step: Step, side: int, latents: Tensor) -> Tensor | None:
        """The velocity (B, C, F, H, W) float32, or None.

        Asked for all sides before any of them runs. A side that is answered does not enter the network, and
        where all are, nothing is streamed.
        """
        ...

    def recall(self, step: Step, side: int, probe: Probe) -> Tensor | None:
        """What the blocks would change of the tokens, (B, L, D), or None: run them."""
        ...

    def keep(
        self, step: Step, side: int, *, change: Tensor | None = None, velocity: Tensor | None = None
    ) -> None:
        """The blocks have run and changed the tokens by ``change``, the network answered ``velocity``."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """What `restore` needs to go on behind the last step, by name."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on as the cache whose `state` this was would have; called after `begin`."""
        ...
