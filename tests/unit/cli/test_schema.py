"""An argument is declared once: flags, help, columns, tables and schema are made from its field."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffsynth.cli.flags import FLAGS
from diffsynth.cli.schema import schema
from diffsynth.conditioning.argument import argument, arguments_of
from diffsynth.models.registry import ARCHITECTURES
from diffsynth.pipelines.options import call_arguments
from diffsynth.pipelines.request import known_arguments
from diffsynth.pipelines.unread import OF_TWO_EXPERTS
from tests.unit.cli.running import Shell

REPOSITORY = Path(__file__).parents[3]

# a made-up condition, declared before anything is made of the declarations
SOUND = """
import json, os, sys
os.environ["COLUMNS"] = "120"
from dataclasses import dataclass
from diffsynth.conditioning.argument import SOURCE, argument
from diffsynth.conditioning.registry import CONDITIONERS

@dataclass(frozen=True, kw_only=True, slots=True)
class SoundInputs:
    loudness: float | None = argument(
        None, help="How loud it is, whatever `num_frames` says.", kind="number", scope="clip", unit="dB",
        group=SOURCE, official=("volume",),
    )

class SoundConditioner:
    Inputs, encoder = SoundInputs, None
    def reads(self, facts):
        return frozenset({"loudness"} if "speed" in facts.adapters else ())
    def needs(self, facts):
        return frozenset()

CONDITIONERS["sound"] = SoundConditioner()
from typer.testing import CliRunner
from diffsynth.cli.app import app
from diffsynth.cli.flags import FLAGS
from diffsynth.cli.schema import schema
from diffsynth.models.table import tables
from diffsynth.training.dataset.columns import known_columns
told = schema()
print(json.dumps({
    "help": CliRunner().invoke(app, ["generate", "--help"]).output,
    "column": known_columns()["loudness"],
    "schema": next(each for each in told["arguments"] if each["name"] == "loudness"),
    "models": [each["kind"] for each in told["models"] if "loudness" in each["reads"]],
    "table": tables(),
    "renamed": [flag.name for flag in FLAGS if "volume" in flag.official],
    "has_torch": "torch" in sys.modules,
}))
"""


def test_a_declared_field_is_a_flag_a_column_and_a_line_of_every_table() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SOUND], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    assert "--loudness" in told["help"]
    assert "How loud it is, whatever --num-frames says." in " ".join(told["help"].replace("│", " ").split())
    assert (told["column"], told["renamed"], told["models"]) == ("number", ["loudness"], ["speed"])
    assert told["schema"] == {
        "name": "loudness", "type": "float | None", "kind": "number", "default": None, "unit": "dB",
        "help": "How loud it is, whatever `num_frames` says.", "choices": None, "scope": "clip",
        "group": "Start from a video", "flags": ["--loudness"],
    }  # fmt: skip
    [row] = [line for line in told["table"].splitlines() if "`loudness`" in line]
    assert row.startswith("| Wan2.1 T2V 1.3B with speed control |")
    assert not told["has_torch"]


def test_schema_tells_every_argument_and_what_each_model_reads(shell: Shell) -> None:
    told = json.loads(shell("schema", "--json").out)
    assert told == json.loads(json.dumps(schema()))
    arguments = {each["name"]: each for each in told["arguments"]}
    assert set(arguments) == set(call_arguments()) <= set(known_arguments())
    assert all(each["help"].endswith(".") for each in told["arguments"])
    assert arguments["sampler"]["choices"] == ["euler", "unipc", "dpm++"]
    assert arguments["progress_bar_cmd"]["default"] is None, "an object of Python"
    for model in told["models"]:
        assert set(model["needs"]) <= set(model["reads"]) <= set(arguments)
        assert (set(OF_TWO_EXPERTS) <= set(model["reads"])) == (model["experts"] == 2)
    listed = shell("schema").out
    assert all(f"{name}: " in listed for name in arguments)


def test_a_field_that_nothing_declares_or_two_declare_is_a_mistake_of_ours() -> None:
    @dataclass
    class One:
        depth: int = argument(1, help="How deep.", kind="whole")

    @dataclass
    class Reader:
        depth: int = 1

    assert arguments_of([Reader, One])["depth"].help == "How deep."
    with pytest.raises(TypeError, match="depth: read by an Inputs dataclass, and declared by none"):
        arguments_of([Reader])
    with pytest.raises(TypeError, match="depth is declared twice, the second time by One"):
        arguments_of([One, One])
    with pytest.raises(TypeError, match="unti"):
        argument(1, help="How deep.", kind="whole", unti="m")
    with pytest.raises(ValueError, match="kind is 'hole'"):
        argument(1, help="How deep.", kind="hole")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scope is 'clips'; known: clip, run"):
        argument(1, help="How deep.", kind="whole", scope="clips")


def test_an_adapter_stands_in_the_registry_under_its_own_name() -> None:
    from importlib import import_module

    rows = [row for row in ARCHITECTURES if row.is_adapter and row.module is not None]
    assert rows
    for row in rows:
        module, _, name = str(row.module).partition(":")
        assert getattr(import_module(module), name).name == row.part


def test_flags_and_their_help_are_those_that_users_know() -> None:
    told = [[flag.panel, "/".join(flag.all_spellings), flag.help] for flag in FLAGS]
    known = json.loads((REPOSITORY / "tests" / "data" / "flags.json").read_text(encoding="utf-8"))
    assert told == known, (
        "a change of this list is a decision: change tests/data/flags.json and the changelog"
    )
