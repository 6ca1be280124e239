"""A plan for every published checkpoint, from its header, in a process without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.unit.checkpoints.weights import expected, manifests, write_sparse

REPOSITORY = Path(__file__).parents[3]
ADAPTERS = ("wan_video_vace", "wan_video_motion_controller")  # in files of their own
NO_PART_OF_A_PIPELINE = {"dancer", "video-as-prompt", "animate-2", "longcat"}

PLAN_ALL = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
from diffsynth.cli.plan import PlanRequest, find_parts
from diffsynth.errors import MemoryBudgetError, MissingModelError
from diffsynth.vram_management.plan import Rates

base = PlanRequest(height=480, width=832, num_frames=81, num_branches=2, dtype="bf16", num_persistent=None,
                   vram_gib=None, ram_gib=None, rates=Rates())
told, slowest = {}, 0.0
for file in sorted(Path(sys.argv[1]).iterdir()):
    try:
        parts = find_parts([str(file)])
    except MissingModelError as error:
        told[file.stem] = str(error)
        continue
    answers = told[file.stem] = []
    for height, width in ((480, 832), (720, 1280)):
        for gib in (8, 12, 16, 24, 48, 80):
            start = time.process_time()
            try:
                plan = parts.plan(replace(base, height=height, width=width, vram_gib=gib))
                answers.append([gib, plan.peak_bytes + plan.reserve_bytes, plan.verdict])
            except MemoryBudgetError as error:
                answers.append([gib, error.minimum_gib, str(error)])
            slowest = max(slowest, time.process_time() - start)
heavy = sorted({"torch", "numpy", "safetensors"} & set(sys.modules))
sizes = {"diffsynth.models.wan", "diffsynth.models.wan.dit_config", "diffsynth.models.wan.facts"}
networks = sorted(name for name in {*sys.modules} - sizes if name.startswith("diffsynth.models.wan"))
json.dump({"told": told, "heavy": heavy + networks, "slowest_s": slowest}, sys.stdout)
"""


def test_every_checkpoint_has_a_plan_within_its_budget_or_a_clear_refusal(tmp_path: Path) -> None:
    for model, shapes in manifests().items():
        write_sparse(tmp_path / f"{model}.safetensors", shapes)
    done = subprocess.run(
        [sys.executable, "-c", PLAN_ALL, str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["heavy"] == [] and answer["slowest_s"] < 1
    assert set(answer["told"]) == set(manifests())
    for model, answers in answer["told"].items():
        if expected()[model]["family"] in NO_PART_OF_A_PIPELINE:
            assert "not one of the Wan models" in answers, model
            continue
        if expected()[model]["networks"][0] in ADAPTERS:
            assert "works beside a DiT: give that too" in answers, model
            continue
        assert len(answers) == 12
        for gib, size, words in answers:
            if words in ("resident", "compute-bound", "copy-bound"):
                assert 0 < size <= gib * 2**30, (model, gib)
            else:
                assert size > gib and f"at least {size:.2f} GiB" in words and "Raise it" in words
        # what fits a card fits a larger one
        fits = [words != "" and "at least" not in words for _, _, words in answers]
        assert fits[:6] == sorted(fits[:6]) and fits[6:] == sorted(fits[6:])
        assert fits[5] and fits[11], f"{model} fits 80 GiB"


def test_a_14b_model_fits_8_gib_at_both_sizes() -> None:
    from tests.unit.vram_management.plans import LARGE, SMALL, pipeline_14b, plan

    for size in (SMALL, LARGE):
        found = plan(pipeline_14b(), vram_limit_gib=8, **size)
        assert found.networks["dit"].where == "streamed" and found.verdict == "compute-bound"
