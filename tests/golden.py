"""Numbers that the reference implementations computed, one case at a time.

    golden = case("A_t2v_wan21_size0")
    model = build(**golden.config)
    model.load_state_dict(golden.weights("model"))             # official key names; the draw is checked
    golden.assert_close("out_t999", model(golden.inputs["x0"], ...))

``tests/data/golden/index.json`` tells of each case what was called (``semantics``, ``reference``), on which
inputs (``arguments``, by tag), and how exactly each output must be met. The references ran on a CPU in
float32. The tolerance of an output is ten times the larger of two measured differences, to the same code in
float64 and to the same code on another number of threads, and at least 2e-6 of its largest value: room for
any order of summation, far too little for a wrong constant, a swapped axis or a missing term.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.golden_recipe import fingerprint, recipe_frames, recipe_ids, recipe_input, recipe_state_dict

FOLDER = Path(__file__).parent / "data" / "golden"


@dataclass(frozen=True)
class Case:
    """One call of a reference implementation: what went in, what came out, how near is near enough."""

    name: str
    entry: Mapping[str, Any]  # the case's whole entry of index.json

    @property
    def config(self) -> dict[str, Any]:
        """The sizes and switches of the model or solver, as the reference names them."""
        return dict(self.entry["config"])

    @property
    def arguments(self) -> dict[str, Any]:
        """Which input goes where, and what is done to it after the draw (clamp, zero rows ...)."""
        return dict(self.entry["arguments"])

    @property
    def pairs(self) -> list[dict[str, str]]:
        """Strings of the prompt-cleaning case: the input and what each cleaner makes of it."""
        return list(self.entry["pairs"])

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """Inputs by tag: float32 latents and features, int64 ids, or uint8 frames (F, H, W, 3)."""
        return dict(_draw(entry) for entry in self.entry["inputs"])

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        """Everything that the reference stored, by name."""
        return load_file(FOLDER / self.entry["file"])

    @property
    def models(self) -> list[str]:
        """Names of the networks whose weights the case needs."""
        return list(self.entry["weights"])

    def shapes(self, model: str = "model") -> dict[str, tuple[int, ...]]:
        """Return official checkpoint key -> shape of one network."""
        stored = json.loads(
            (FOLDER / self.entry["weights"][model]["shapes_file"]).read_text(encoding="utf-8")
        )
        return {name: tuple(shape) for name, shape in stored.items()}

    def weights(self, model: str = "model") -> dict[str, Tensor]:
        """Draw one network's float32 parameters under their official keys, and check the draw."""
        entry = self.entry["weights"][model]
        drawn = recipe_state_dict(self.shapes(model), entry["weights_seed"])
        names, *sums = fingerprint(drawn)
        stored_names, *stored_sums = entry["fingerprint"]
        assert names == stored_names, f"{self.name}: names or shapes of {model!r} are not the stored ones"
        assert sums == pytest.approx(stored_sums, rel=1e-6, abs=1e-3), (
            f"{self.name}: another draw of {model!r}"
        )
        return drawn

    def atol(self, name: str) -> float:
        """Return the largest absolute difference that output ``name`` may show; 0 if it must be equal."""
        rule = self.entry["outputs"][name]
        return 0.0 if rule.get("exact") else float(rule.get("atol", rule.get("max_difference")))

    def assert_close(self, name: str, tensor: Tensor) -> None:
        """Fail unless ``tensor`` meets stored output ``name`` by the output's own rule.

        Floats: max |difference| <= atol, no relative part. Integers: equal. Frames of 8 bits: up to one
        level apart in at most 1 % of the values. Device and float type do not matter, shapes do.
        """
        rule, stored = self.entry["outputs"][name], self.outputs[name]
        what = f"{self.name}/{name}"
        assert tensor.shape == stored.shape, f"{what} is {tuple(tensor.shape)}, stored {tuple(stored.shape)}"
        assert tensor.is_floating_point() == stored.is_floating_point(), (
            f"{what} is {tensor.dtype}, stored {stored.dtype}"
        )
        difference = (tensor.detach().cpu().double() - stored.double()).abs()
        assert difference.isfinite().all(), f"{what} holds NaN or infinity"
        largest, allowed = float(difference.max()), self.atol(name)
        assert largest <= allowed, f"{what}: largest difference {largest:.3g}, allowed {allowed:.3g}"
        share = float((difference > 0).double().mean())
        allowed_share = rule.get("max_share_different", 1.0)
        assert share <= allowed_share, (
            f"{what}: {share:.2%} of the values differ, allowed {allowed_share:.2%}"
        )


def case(name: str) -> Case:
    """Return the stored case ``name``; a KeyError lists those of its group."""
    index = _index()
    if name not in index:
        raise KeyError(f"no stored case {name!r}; there are {', '.join(names(name[:2]))}")
    return Case(name, index[name])


def names(prefix: str = "") -> list[str]:
    """Return the names of all stored cases that begin with ``prefix``, for pytest.mark.parametrize."""
    return sorted(name for name in _index() if name.startswith(prefix))


@cache
def _index() -> dict[str, Mapping[str, Any]]:
    entries: Sequence[Mapping[str, Any]] = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))[
        "cases"
    ]
    return {entry["name"]: entry for entry in entries}


def _draw(entry: Mapping[str, Any]) -> tuple[str, Tensor]:
    seed = entry["seed"]
    if "ids_tag" in entry:
        tag = entry["ids_tag"]
        return tag, recipe_ids(tag, entry["shape"], entry["low"], entry["high"], seed)
    if "frames_tag" in entry:
        tag = entry["frames_tag"]
        return tag, recipe_frames(tag, entry["frames"], entry["height"], entry["width"], seed)
    return entry["tag"], recipe_input(entry["tag"], entry["shape"], seed, entry.get("scale", 1.0))
