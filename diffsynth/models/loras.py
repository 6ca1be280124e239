"""The LoRAs of a manager's networks: fused into weights or attached beside them, changed and taken away.

Every change goes through the guards of the pipelines that were made of these networks: a pipeline that holds
to limits on memory lets its networks rest as plain ones meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from diffsynth.announce import announce
from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.detect import detect
from diffsynth.checkpoints.files import PathLike
from diffsynth.checkpoints.hashing import hash_of_tensors
from diffsynth.checkpoints.hints import Role, role_of
from diffsynth.errors import ArgumentError, LoRAError, UnknownCheckpointError
from diffsynth.lora.attach import Dial, attach, detach
from diffsynth.lora.changes import Change, Decomposed, tensors_of, with_tensors
from diffsynth.lora.formats import LoRA, is_lora, read_loras, with_role
from diffsynth.lora.fuse import fuse, original_tensor
from diffsynth.lora.matching import LoRAReport, Network, fit
from diffsynth.models.lora_experts import (
    Aim,
    Expert,
    PerExpert,
    common_name,
    files_of,
    number,
    role_by_path,
    role_of_arguments,
    strength_for,
    tell_of_twins,
)
from diffsynth.models.registry import ARCHITECTURES

if TYPE_CHECKING:
    from diffsynth.models.model_manager import LoadedModel

logger = logging.getLogger("diffsynth")

Mode = Literal["fuse", "attach"]
Weight = float | Sequence[float]
Guard = Callable[[], AbstractContextManager[None]]


@dataclass(eq=False, kw_only=True)
class _Held:
    """A LoRA that was loaded."""

    dial: Dial
    mode: Mode
    reports: list[LoRAReport] = field(default_factory=list)
    changes: list[tuple[LoadedModel, Mapping[str, Change]]] = field(default_factory=list)
    pair: str = ""  # the name that it shares with that of the other expert
    first_step: int = 0  # of its schedule: that of its expert, for a schedule of that expert's steps

    @property
    def role(self) -> Role | None:
        """The one expert that it is for; None: both, or the only DiT."""
        roles = {report.lora.role for report in self.reports}
        return roles.pop() if len(roles) == 1 else None

    def names_in(self, entry: LoadedModel) -> Mapping[str, Change]:
        """What it changes in a network, by tensor."""
        return {name: change for own, some in self.changes if own is entry for name, change in some.items()}

    @cached_property
    def content(self) -> str:
        """A hash of what it changes and how, whatever its file and dialect."""
        named = []
        for place, (entry, some) in enumerate(self.changes):
            for name, change in some.items():
                tensors = tensors_of(change)
                formula = with_tensors(change, {key: torch.empty(0) for key in tensors})
                named += [(f"{place} {entry.name} {name} {key} {formula}", t) for key, t in tensors.items()]
        return hash_of_tensors(named)


class LoRAs:
    """See this module's legend.

    Args:
        loaded: networks of the manager; the list itself, which grows.
    """

    def __init__(self, loaded: Sequence[LoadedModel]) -> None:
        self._loaded = loaded
        self._held: dict[str, _Held] = {}
        self._roles: dict[int, Role] = {}  # by the id of an entry
        self._guards: list[WeakMethod[Guard]] = []
        self._values: list[float] = []  # strengths when the last step began

    @property
    def names(self) -> list[str]:
        """Of those that are loaded."""
        return list(self._held)

    @property
    def sources(self) -> list[str]:
        """The files of those that are loaded."""
        return [report.source for held in self._held.values() for report in held.reports]

    def act_on(self, network: torch.nn.Module) -> bool:
        """Whether one of them changes a network, at any step."""
        return any(
            entry.model is network and bool(changes) and held.dial.is_felt
            for held in self._held.values()
            for entry, changes in held.changes
        )

    def describe(self) -> list[str]:
        """A line each, with its strength as it is now."""
        return [report.told(str(held.dial)) for held in self._held.values() for report in held.reports]

    def facts(self) -> list[dict[str, object]]:
        """What each is and how strongly it acts, as plain values that tell whether another is the same."""
        return [
            {
                "name": held.dial.name,
                "content": held.content,
                "mode": held.mode,
                "strength": held.dial.weight if held.dial.schedule is None else list(held.dial.schedule),
                "is_on": held.dial.is_on,
            }
            for held in self._held.values()
        ]

    def holds(self, network: nn.Module) -> bool:
        """Whether a network is one of these that LoRAs go to."""
        return any(entry.model is network for entry in self._loaded)

    def guard(self, around: Guard) -> None:
        """Enter this around every change; a bound method, which is not kept alive."""
        self._guards.append(WeakMethod(around))

    def assign(self, roles: Mapping[Role, Sequence[LoadedModel]]) -> None:
        """Say which networks are those of each expert; without it their paths tell, else their order."""
        self._roles = {id(entry): role for role, entries in roles.items() for entry in entries}

    def swap_roles(self) -> None:
        """The two experts change places."""
        self._roles = {key: "low" if role == "high" else "high" for key, role in self._roles.items()}

    def load(
        self,
        file_path: PathLike | Sequence[PathLike] = "",
        lora_alpha: float | PerExpert = 1.0,
        name: str | None = None,
        mode: Mode = "fuse",
        network: str | None = None,
        expert: Expert | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        only: nn.Module | None = None,
    ) -> list[LoRAReport]:
        """See `ModelManager.load_lora`; ``only``: no network but this one."""
        in_memory = _in_memory(file_path, state_dict)
        given = [file_path] if isinstance(file_path, (str, Path)) else list(file_path)
        paths = [file for path in given for file in files_of(Path(path), expert)]
        if in_memory is not None:
            paths = list(in_memory.paths)
        if is_pair := len(paths) == 2 and len({common_name(path.stem) for path in paths}) == 1:
            is_pair = {role_of((path,), {}) for path in paths} == {"high", "low"}
        if mode not in ("fuse", "attach"):
            raise ArgumentError(f"mode is {mode!r}; give 'fuse' or 'attach'.")
        if not paths or (name is not None and len(paths) > 1 and not is_pair):
            raise ArgumentError(
                f"{len(paths)} LoRA files and name={name!r}: give a name to one file at a time."
            )
        aim = Aim(network, role_of_arguments(network, expert), only)
        planned: list[_Held] = []
        for path in paths:
            held = self._planned(in_memory or Checkpoint.open(path), mode, aim)
            own = f"{name}_{held.role}_noise" if is_pair and name is not None else name
            held.dial.name = _free_name(own, path, {*self._held, *(one.dial.name for one in planned)})
            held.dial.weight = strength_for(lora_alpha, held.role, path)
            held.pair = name or common_name(path.stem)
            planned.append(held)
        with self._guarded():
            for held in planned:
                self._put(held)
        for held in planned:
            held.reports = [
                replace(report, name=held.dial.name, weight=held.dial.weight) for report in held.reports
            ]
        if expert is None and not is_pair:
            tell_of_twins(paths, self._held)
        for report in (report for held in planned for report in held.reports):
            (logger.warning if report.missing else announce)("%s", report)
        return [report for held in planned for report in held.reports]

    def set(self, name: str, weight: Weight | Mapping[Role, Weight]) -> None:
        """See `ModelManager.set_lora`."""
        chosen = self._find(name)
        if isinstance(weight, Mapping):
            by_role = {held.role: held for held in chosen}
            if unknown := [role for role in weight if role not in by_role]:
                raise ArgumentError(
                    f"set_lora({name!r}, ...) names the experts {', '.join(map(repr, unknown))}, and "
                    f"{name!r} is no pair with a file for each. Load it per expert: load_lora(FILE, "
                    "name=..., expert='high'), and expert='low'."
                )
            pairs = [(by_role[role], own) for role, own in weight.items()]
        else:
            pairs = [(held, weight) for held in chosen]
        for held, own in pairs:
            self._set(held, own)

    def _set(self, held: _Held, weight: Weight) -> None:
        name = held.dial.name
        if isinstance(weight, (int, float)):
            schedule, single = None, number(weight, "weight")
        else:
            schedule, single = tuple(number(value, "weight") for value in weight), held.dial.weight
            if held.mode == "fuse":
                raise ArgumentError(
                    f"{name!r} is fused into the weights, which have one strength; for a schedule load it "
                    "with mode='attach'."
                )
            if not schedule:
                raise ArgumentError("weight is an empty schedule; give one strength per step.")
        with self._guarded(is_needed=held.mode == "fuse"):
            held.dial.weight, held.dial.schedule, held.dial.is_on = single, schedule, True
            self._remake(held)

    def disable(self, name: str | None = None) -> None:
        """See `ModelManager.disable_lora`."""
        chosen = list(self._held.values()) if name is None else self._find(name)
        with self._guarded(is_needed=any(held.mode == "fuse" for held in chosen)):
            for held in chosen:
                held.dial.is_on = False
                self._remake(held)

    def unload(self, name: str | None = None) -> None:
        """See `ModelManager.unload_lora`."""
        chosen = list(self._held.values()) if name is None else self._find(name)
        with self._guarded():
            for held in chosen:
                del self._held[held.dial.name]
                if held.mode == "attach":
                    for entry, _ in held.changes:
                        detach(entry.model, held.dial)
                self._remake(held)

    def begin(self, num_steps: int, num_high_steps: int | None = None) -> None:
        """A generation of so many steps begins: schedules stand at their first strength.

        Args:
            num_steps: of the whole generation.
            num_high_steps: of the high-noise expert; None: there is one DiT. The LoRA of one expert may have
                a schedule of that expert's steps.

        Raises:
            ArgumentError: when a schedule has another length.
        """
        for held in self._held.values():
            schedule, held.first_step = held.dial.schedule, 0
            if schedule is None or len(schedule) == num_steps:
                continue
            own = ""
            if num_high_steps is not None and held.role is not None:
                own_steps = num_high_steps if held.role == "high" else num_steps - num_high_steps
                if len(schedule) == own_steps:
                    held.first_step = num_steps - own_steps if held.role == "low" else 0
                    continue
                own = f", or one for each of the {own_steps} steps of the {held.role}-noise expert"
            raise ArgumentError(
                f"set_lora({held.dial.name!r}, ...) gave {len(schedule)} strengths and this call has "
                f"{num_steps} steps; give one per step{own}."
            )
        self.advance(0)

    def advance(self, step: int) -> bool:
        """Step ``step`` comes next; whether a strength is another than when the last one began."""
        for held in self._held.values():
            held.dial.step = max(0, step - held.first_step)
        before, self._values = self._values, [held.dial.value for held in self._held.values()]
        return before != self._values

    def _planned(self, checkpoint: Checkpoint, mode: Mode, aim: Aim) -> _Held:
        """Everything about a file that can fail, before anything is changed."""
        _require_lora(checkpoint)
        entries = [entry for entry in self._loaded if _takes_loras(entry)]
        if not entries:
            raise LoRAError(
                f"{checkpoint.source} is a LoRA, and no manager holds a DiT for it; load the model "
                "first, with load_models."
            )
        layers = {n.rpartition(".")[0] for entry in entries for n in entry.match.checkpoint.shapes}
        stem = checkpoint.paths[0].stem
        held = _Held(dial=Dial(stem), mode=mode)
        roles = {id(entry): self._roles.get(id(entry)) or role_by_path(entry, entries) for entry in entries}
        if aim.module is not None:
            entries = _of_module(entries, aim.module)
        for found in read_loras(checkpoint, layers):
            role = roles[id(entries[0])] if aim.module is not None else aim.role
            lora = found if role is None else with_role(found, role)
            chosen = _chosen(lora, entries, roles, aim.network)
            changes, missing = fit(lora, [_network(entry) for entry in chosen])
            _check_finite(lora, [change for some in changes for change in some.values()])
            own = [(entry, some) for entry, some in zip(chosen, changes, strict=True) if some]
            held.changes += own
            lost = {key for keys in missing.values() for key in keys}
            report = LoRAReport(
                name=stem, source=lora.source, lora=lora, mode=mode, weight=1.0,
                fitted={_title(entry, roles[id(entry)]): _num_layers(some) for entry, some in own},
                num_keys_read=lora.num_keys - len(lost), missing=missing,
            )  # fmt: skip
            held.reports.append(report)
        self._check_together(held)
        return held

    def _check_together(self, new: _Held) -> None:
        """A DoRA scales the whole weight: what is fused there and what is attached would not add up."""
        for old in self._held.values():
            for entry, some in new.changes if old.mode != new.mode else ():
                own = old.names_in(entry)
                for name in some:
                    if name in own and any(isinstance(c, Decomposed) for c in (some[name], own[name])):
                        raise ArgumentError(
                            f"{new.dial.name!r} and {old.dial.name!r} both change {name}, and one of them is "
                            f"a DoRA, which rescales it: load both with the same mode ({old.mode!r})."
                        )

    def _put(self, held: _Held) -> None:
        self._held[held.dial.name] = held
        if held.mode == "fuse":
            self._remake(held)
            return
        for entry, changes in held.changes:
            originals = {
                name: original_tensor(entry.model, entry.match.checkpoint, name)
                for name, change in changes.items()
                if isinstance(change, Decomposed)
            }
            attach(entry.model, changes, held.dial, originals)

    def _remake(self, held: _Held) -> None:
        """Make every weight anew that this LoRA is, or was, fused into."""
        if held.mode != "fuse":
            return
        fused = [one for one in self._held.values() if one.mode == "fuse" and one.dial.value != 0.0]
        for entry, changes in held.changes:
            by_lora = [(one.names_in(entry), one.dial.value) for one in fused]
            for name in changes:
                sums = [(some[name], weight) for some, weight in by_lora if name in some]
                fuse(entry.model, entry.match.checkpoint, name, sums)

    def _find(self, name: str) -> list[_Held]:
        """The LoRA of this name, or the two of a pair."""
        if name in self._held:
            return [self._held[name]]
        pair = [held for held in self._held.values() if held.pair == name]
        if not pair:
            loaded = ", ".join(map(repr, self._held)) or "none"
            raise ArgumentError(f"No LoRA is named {name!r}; loaded: {loaded}.")
        return pair

    @contextmanager
    def _guarded(self, is_needed: bool = True) -> Iterator[None]:
        self._guards = [guard for guard in self._guards if guard() is not None]
        with ExitStack() as stack:
            for guard in self._guards if is_needed else ():
                if (around := guard()) is not None:
                    stack.enter_context(around())
            with torch.no_grad():
                yield


def _in_memory(
    file_path: PathLike | Sequence[PathLike], state_dict: Mapping[str, Tensor] | None
) -> Checkpoint | None:
    """The tensors of a LoRA that the caller has read; None: it is in files."""
    if not state_dict:
        if not file_path:
            raise ArgumentError("There is no LoRA; give its file, or state_dict= with its tensors.")
        return None
    if file_path:
        raise ArgumentError(f"{file_path} and state_dict= are both given; give one of them.")
    return Checkpoint.of_tensors(state_dict, "state_dict")


def _free_name(name: str | None, path: Path, taken: Container[str]) -> str:
    """The name given, else the file's: numbered where a LoRA has it, for one that is loaded twice adds twice.

    Raises:
        ArgumentError: when the given name is taken.
    """
    if name is not None and name in taken:
        raise ArgumentError(
            f"A LoRA named {name!r} is loaded already; give this one another name=, leave name= out, or call "
            f"unload_lora({name!r}) first."
        )
    stem = path.stem if name is None else name
    if stem not in taken:
        return stem
    number = next(n for n in count(2) if f"{stem}-{n}" not in taken)
    logger.warning("A LoRA named %r is loaded already: this one adds to it, as '%s-%d'.", stem, stem, number)
    return f"{stem}-{number}"


def _of_module(entries: Sequence[LoadedModel], module: nn.Module) -> list[LoadedModel]:
    found = [entry for entry in entries if entry.model is module]
    if not found:
        names = ", ".join(entry.name for entry in entries)
        raise ArgumentError(
            f"The {type(module).__name__} that the LoRA is for is no network of this pipeline that takes "
            f"LoRAs; give pipe.dit or another of {names}, or the file alone: load_lora(FILE)."
        )
    return found


def _require_lora(checkpoint: Checkpoint) -> None:
    if is_lora(checkpoint):
        return
    try:
        found = detect(checkpoint, ARCHITECTURES)
    except UnknownCheckpointError:
        return  # the reader says that nothing in it is a LoRA's
    raise LoRAError(
        f"{checkpoint.source} is a model ({found[0].needs}), not a LoRA: load it with load_models(PATH)."
    )


def _takes_loras(entry: LoadedModel) -> bool:
    from diffsynth.models.wan.adapters.adapter import DiTAdapter
    from diffsynth.models.wan.dit import WanDiT

    return isinstance(entry.model, (WanDiT, DiTAdapter))


def _chosen(
    lora: LoRA, entries: Sequence[LoadedModel], roles: Mapping[int, Role | None], network: str | None
) -> list[LoadedModel]:
    """The networks that a LoRA is for: those of its expert, or those that the caller names."""
    names = sorted({entry.name for entry in entries})
    if network not in (None, "high", "low", *names):
        raise ArgumentError(f"network is {network!r}; give 'high', 'low', or one of {', '.join(names)}.")
    if network in names:
        entries = [entry for entry in entries if entry.name == network]
    chosen = [entry for entry in entries if lora.role is None or roles[id(entry)] in (None, lora.role)]
    if not chosen:
        other = "low" if lora.role == "high" else "high"
        raise LoRAError(
            f"{lora.source} is for the {lora.role}-noise expert, which is not loaded. Load it, or say "
            f"expert={other!r} to use the LoRA on the other one."
        )
    return chosen


def _network(entry: LoadedModel) -> Network:
    return Network(
        title=entry.match.needs, source=entry.match.checkpoint.source, shapes=entry.match.checkpoint.shapes
    )


def _title(entry: LoadedModel, role: Role | None) -> str:
    return entry.name if role is None else f"{entry.name} ({role} noise)"


def _num_layers(changes: Mapping[str, Change]) -> int:
    return len({name.rpartition(".")[0] for name in changes})


def _check_finite(lora: LoRA, changes: Sequence[Change]) -> None:
    for change in changes:
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(change).values()):
            name = next(
                n for n, layer in lora.layers.items() if change is layer.weight or layer.bias is not None
            )
            raise LoRAError(f"{lora.source} holds NaN or infinity, at {name} or nearby; download it again.")
