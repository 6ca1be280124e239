"""What an adapter can do at the doors: clocks, memory and keys of its own; what it is told of the step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from diffsynth.conditioning.conditions import Conditions
from diffsynth.models.wan.adapters.adapter import DiTAdapter
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.stream import Call, TokenStream
from diffsynth.ops.attention import AttentionKernel
from diffsynth.ops.attention_lse import attend_with_lse, join_attention
from diffsynth.ops.rope import video_rotation
from diffsynth.sampling.step import Step
from tests.golden_recipe import recipe_state_dict
from tests.step_caches import step
from tests.toys import TOY_DIT

LATENTS = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(2))
NOW = torch.tensor([700.0])
TEXT = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
NUM_TOKENS = 2 * 2 * 2


@pytest.fixture
def dit() -> WanDiT:
    made = WanDiT(TOY_DIT)
    made.load_state_dict(recipe_state_dict({n: tuple(t.shape) for n, t in made.state_dict().items()}, 1))
    return made.requires_grad_(False).eval()


def velocity(
    dit: WanDiT,
    adapters: Sequence[DiTAdapter],
    timestep: Tensor = NOW,
    told: Step | None = None,
    given: int = 1,
) -> Tensor:
    conditions = Conditions(text=TEXT, adapters={adapter.name: given for adapter in adapters})
    with torch.no_grad():
        [made] = dit(LATENTS, timestep, [dit.prepare(conditions, adapters)], step=told)
    return made


class Tokens(DiTAdapter):
    """Copies the first frame's tokens to one end of the sequence, under a time of its own."""

    def __init__(self, name: str, time: float | None, *, in_front: bool) -> None:
        super().__init__()
        self.name, self._time, self._in_front = name, time, in_front
        self.seen: list[TokenStream] = []

    def extend(self, stream: TokenStream, memory: object, step: Step | None) -> TokenStream:
        first = slice(stream.video.start, stream.video.start + 4)
        times = None if self._time is None else torch.full((1, 1), self._time)
        return stream.with_tokens(
            stream.x[:, first], stream.rotary[first], times=times, in_front=self._in_front
        )

    def begin(self, stream: TokenStream, memory: object, call: Call, step: Step | None) -> object:
        self.seen.append(stream)
        return None


FRONT, BEHIND = (
    lambda time: Tokens("front", time, in_front=True),
    lambda time: Tokens("behind", time, in_front=False),
)


@pytest.mark.parametrize(
    ("adapters", "times", "clock"),
    [
        pytest.param([FRONT(0.0)], [0.0, 700.0], [0] * 4 + [1] * 8, id="front"),
        pytest.param([BEHIND(0.0)], [0.0, 700.0], [1] * 8 + [0] * 4, id="behind"),
        pytest.param(
            [FRONT(900.0), BEHIND(0.0)], [0.0, 700.0, 900.0], [2] * 4 + [1] * 8 + [0] * 4, id="both"
        ),
        pytest.param([FRONT(0.0), BEHIND(0.0)], [0.0, 700.0], [0] * 4 + [1] * 8 + [0] * 4, id="one-time"),
        pytest.param([FRONT(700.0)], [700.0], None, id="the-video's"),
    ],
)
def test_tokens_bring_times_and_clocks_of_their_own(
    adapters: list[Tokens], times: list[float], clock: list[int] | None, dit: WanDiT
) -> None:
    made = velocity(dit, adapters)
    assert made.shape == LATENTS.shape
    stream = adapters[-1].seen[-1]
    assert [round(float(time), 3) for time in stream.times[0].sort().values] == times
    told = None if stream.clock is None else stream.times[0][stream.clock].tolist()
    assert told == (None if clock is None else [times[place] for place in clock])


@pytest.mark.parametrize("make", [FRONT, BEHIND], ids=["front", "behind"])
def test_tokens_of_the_videos_own_time_need_no_clock_of_theirs(make: object, dit: WanDiT) -> None:
    own, told = make(None), make(700.0)  # type: ignore[operator]
    assert torch.equal(velocity(dit, [own]), velocity(dit, [told]))
    other = velocity(dit, [make(0.0)])  # type: ignore[operator]
    assert not torch.allclose(other, velocity(dit, [told]))


def test_a_clock_in_front_equals_a_frame_of_the_video_with_that_time(dit: WanDiT) -> None:
    """Where the tokens, their places and times are those of a video one frame longer, so is the rest."""
    longer = torch.cat([LATENTS[:, :, :1], LATENTS], dim=2)
    rotary = video_rotation((3, 2, 2), 24, torch.device("cpu"))

    class Frame(DiTAdapter):
        name = "frame"

        def extend(self, stream: TokenStream, memory: object, step: Step | None) -> TokenStream:
            moved = stream.with_video_rotary(rotary[4:])
            return moved.with_tokens(stream.x[:, :4], rotary[:4], times=torch.zeros(1, 1))

    branch = dit.prepare(Conditions(text=TEXT))
    with torch.no_grad():
        [whole] = dit(longer, torch.tensor([[0.0, 700.0, 700.0]]), [branch])
    torch.testing.assert_close(velocity(dit, [Frame()]), whole[:, :, 1:], rtol=0, atol=1e-6)


class Warm(DiTAdapter):
    """Adds to the embedded time."""

    name = "warm"

    def time(self, embedded: Tensor, memory: object, step: Step | None) -> Tensor:
        return embedded + 0.5


def test_what_is_added_to_the_time_reaches_blocks_and_head(dit: WanDiT) -> None:
    plain, embed = velocity(dit, []), dit.embed_time
    warm = velocity(dit, [Warm()])
    dit.embed_time = lambda times: embed(times) + 0.5  # type: ignore[method-assign]
    assert torch.equal(warm, velocity(dit, [])) and not torch.allclose(warm, plain)


class Counting(DiTAdapter):
    """Counts what it is asked, and notes what it is told."""

    name = "counting"

    def __init__(self) -> None:
        super().__init__()
        self.prepared: list[object] = []
        self.steps: list[Step | None] = []

    def prepare(self, given: object, dit: WanDiT) -> object:
        self.prepared.append(given)
        return ["memory of", given]

    def embed(self, grid: Tensor, memory: object, step: Step | None) -> Tensor:
        assert isinstance(memory, list) and memory[0] == "memory of"
        self.steps.append(step)
        return grid


def test_sides_that_share_an_input_share_its_memory(dit: WanDiT) -> None:
    adapter, given, other = Counting(), object(), object()
    memories: dict[tuple[str, int], tuple[object, object]] = {}
    branches = [
        dit.prepare(Conditions(text=TEXT, adapters={"counting": one}), [adapter], memories=memories)
        for one in (given, given, other)
    ]
    assert adapter.prepared == [given, other]
    first, second, third = (branch.adapters[0][1] for branch in branches)
    assert first is second and first is not third
    dit.prepare(Conditions(text=TEXT, adapters={"counting": given}), [adapter])
    assert adapter.prepared == [given, other, given], "in training each call prepares"


def test_a_door_knows_its_step(dit: WanDiT) -> None:
    adapter, told = Counting(), step(3, 8)
    velocity(dit, [adapter], told=told)
    velocity(dit, [adapter])
    assert adapter.steps == [told, None]


class KeptKeys(DiTAdapter):
    """Keeps keys and values of a first pass; later ones see them beside their own."""

    name = "kept"

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.is_first = True

    def attend(
        self, index: int, q: Tensor, k: Tensor, v: Tensor, memory: object, step: Step | None,
        kernel: AttentionKernel,
    ) -> Tensor | None:  # fmt: skip
        if self.is_first:
            self.kept[index] = (k, v)
            return None
        return join_attention([attend_with_lse(q, *self.kept[index]), attend_with_lse(q, k, v)])


class Masked(DiTAdapter):
    """The same as one dense pass: tokens in front see each other alone, the video sees all."""

    name = "masked"

    def __init__(self, front: Tensor) -> None:
        super().__init__()
        self._front = front

    def extend(self, stream: TokenStream, memory: object, step: Step | None) -> TokenStream:
        return stream.with_tokens(self._front, stream.rotary)

    def attend(
        self, index: int, q: Tensor, k: Tensor, v: Tensor, memory: object, step: Step | None,
        kernel: AttentionKernel,
    ) -> Tensor | None:  # fmt: skip
        bias = torch.zeros(1, 1, 2 * NUM_TOKENS, 2 * NUM_TOKENS, dtype=q.dtype)
        bias[..., :NUM_TOKENS, NUM_TOKENS:] = -torch.inf
        return kernel(q, k, v, bias=bias)


def test_kept_keys_equal_the_dense_masked_form(dit: WanDiT) -> None:
    kept, patches = KeptKeys(), []

    class Noting(DiTAdapter):
        name = "noting"

        def extend(self, stream: TokenStream, memory: object, step: Step | None) -> TokenStream:
            patches.append(stream.x.clone())
            return stream

    velocity(dit, [kept, Noting()])
    kept.is_first = False
    later = LATENTS.flip(2) * 0.5
    branch = dit.prepare(Conditions(text=TEXT, adapters={"kept": 1}), [kept])
    dense = dit.prepare(Conditions(text=TEXT, adapters={"masked": 1}), [Masked(patches[0])])
    with torch.no_grad():
        [made], [expected] = dit(later, NOW, [branch]), dit(later, NOW, [dense])
        [alone] = dit(later, NOW, [dit.prepare(Conditions(text=TEXT))])
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(made, alone, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_results_over_parts_of_the_keys_join_to_that_over_all(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, length, 3, 16).to(dtype) for length in (7, 11, 11))
    whole, _ = attend_with_lse(q, k, v)
    parts = [attend_with_lse(q, k[:, a:b], v[:, a:b]) for a, b in ((0, 4), (4, 5), (5, 11))]
    scores = torch.einsum("blnd,bsnd->bnls", q.double(), k.double()) / 4
    torch.testing.assert_close(parts[0][1].double(), scores[..., :4].logsumexp(-1), rtol=2e-2, atol=2e-2)
    # two roundings to bfloat16 of numbers around 1, or the last digits of float32
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(join_attention(parts), whole, rtol=0, atol=tolerance)


class NotedSequence:
    """Shares nothing, and notes what it is asked to share."""

    def __init__(self) -> None:
        self.seen: list[TokenStream] = []

    def split(self, stream: TokenStream) -> TokenStream:
        self.seen.append(stream)
        return stream

    def gather(self, x: Tensor) -> Tensor:
        return x


def test_the_sequence_is_split_once_per_side_behind_all_added_tokens(dit: WanDiT) -> None:
    plain = velocity(dit, [FRONT(0.0)])
    dit.sequence = noted = NotedSequence()
    assert torch.equal(velocity(dit, [FRONT(0.0)]), plain)
    assert [stream.x.shape[1] for stream in noted.seen] == [NUM_TOKENS + 4]
