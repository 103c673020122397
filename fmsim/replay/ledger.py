"""What moved and what was kept, step by step: the result of replaying a trace against a policy.

No clock in it.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fmsim.errors import FmsimError
from fmsim.files import replacing, strict_json
from fmsim.files.inputs import read_npz
from fmsim.frames import frame

FORMAT_VERSION = 4


DAMAGED = (
    OSError,
    ValueError,
    IndexError,
    EOFError,
    RuntimeError,  # zipfile's, of an encrypted member; also NotImplementedError
    zipfile.BadZipFile,
    zlib.error,
)
AXES = {
    name: axes
    for axes, names in (
        ("TL", "accessed hit golden golden_hit mass_total mass_kept heaviest_lost"),
        ("TG", "resident demand_loads lookahead_loads written evicted"),
        ("G", "initial"),
        ("T", "scored"),
    )
    for name in names.split()
}


@dataclass(frozen=True)
class Ledger:
    """Axes: T steps, L CSA layers of the trace, G groups (L, or 1 in scope "shared").

    A slot holds `granularity` entries.

    A live decode that scores resident index keys alone does not know what its layers `unmeasured`
    would have selected among all entries: of them the seven fields from `accessed` to
    `heaviest_lost` hold zeros, so that sums over layers are those of the others. Bytes are
    conserved: resident[t] - resident[t - 1] = demand_loads[t] + lookahead_loads[t] + written[t] -
    evicted[t].
    """

    policy: str
    params: dict[str, Any]  # the policy's parameters as plain JSON values
    granularity: int
    scope: str
    on_miss: str
    cadence: int
    tau: int
    n_steps: int  # T
    n_layers: int  # L
    n_groups: int  # G
    n_slots: int  # S: the budget, in slots a group; the most of any group
    group_slots: list[int]  # [G]: slots of each group
    prompt_entries: int
    topk: int

    accessed: np.ndarray  # [T, L] int32: entries selected
    hit: np.ndarray  # [T, L] int32: of these, resident when the step began
    golden: (
        np.ndarray
    )  # [T, L] int32: entries that carry the first 0.6 of the step's compressed mass, at least one
    golden_hit: np.ndarray  # [T, L] int32: of these, resident when the step began
    mass_total: np.ndarray  # [T, L] float32: attention mass on the selected entries
    mass_kept: np.ndarray  # [T, L] float32: of it, on entries attended after on_miss was applied
    heaviest_lost: (
        np.ndarray
    )  # [T, L] float32: the largest mass of one selected entry that was not attended to
    resident: np.ndarray  # [T, G] int32: slots filled at the end of the step
    initial: (
        np.ndarray
    )  # [G] int32: slots filled before the first step (left there by the prefill: no traffic)
    demand_loads: np.ndarray  # [T, G] int32: slots fetched inside the step, which stall it
    lookahead_loads: (
        np.ndarray
    )  # [T, G] int32: slots recalled by the step's decision, in the window before
    written: (
        np.ndarray
    )  # [T, G] int32: slots first filled by entries that closed at this step, on the GPU
    evicted: np.ndarray  # [T, G] int32: slots given up
    set_overlap: (
        np.ndarray
    )  # [n] float32: Jaccard of the resident sets at successive windows' starts, mean over G
    scored: np.ndarray  # [T] int64: entries scored by a memory indexer at this step
    unmeasured: list[int] = field(default_factory=list)  # layers; none in a replay

    # What the run needs of a server, declared by the policy and its cache manager.

    decides_ahead: bool = False  # what a decision recalls is known one cadence before it
    # CSA layers, from 0, whose index keys a memory indexer scores: they keep all of them
    target_layers: list[int] = field(default_factory=list)
    all_keys: bool = True  # every layer's index keys all stay on the GPU
    # [G] spare slots for what is recalled ahead of its decision; none where empty
    ahead_slots: list[int] = field(default_factory=list)
    miss_slots: int = 0  # spare slots a group for one step's misses
    observes: bool = False  # the policy learns from what each step selects
    observes_mass: bool = False  # and from the attention mass on it
    comes_back: bool = False  # pages can be loaded from the host, so a mirror of all lies there
    entry_tokens: int = 4  # tokens of the text in an entry of what was replayed
    masses: bool = True  # the five fields from `golden` on are of masses; else they hold zeros

    def __repr__(self) -> str:
        """One line: the arrays would take pages."""
        return (
            f"<Ledger of {self.policy}: {self.n_steps} steps, {self.n_layers} layers,"
            f" {self.n_slots:,} slots a group>"
        )

    @property
    def budget_entries(self) -> int:
        """Entries that the slots hold, in the mean over groups; rounded down."""
        return sum(self.group_slots) * self.granularity // self.n_groups

    def to_frame(self, by: Literal["step", "layer"] = "step") -> Any:
        """A row a step, sums over layers and groups; by "layer" a row a step and layer, without
        what a set that layers share has for all of them together.

        Columns are the ledger's fields with a step axis, `misses` (entries selected that were not
        resident) and `hit_rate`. A pandas DataFrame where pandas is installed, else a list of
        dicts.
        """
        if by not in ("step", "layer"):
            raise FmsimError(f"by={by!r}: write 'step' or 'layer'")
        columns = {
            f.name: value
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), np.ndarray)
            and value.ndim == 2
            and value.shape[0] == self.n_steps
        }
        if by == "step":
            columns = {name: value.sum(axis=1, keepdims=True) for name, value in columns.items()}
            columns["heaviest_lost"] = self.heaviest_lost.max(axis=1, keepdims=True)
        else:
            width = self.n_layers
            columns = {name: value for name, value in columns.items() if value.shape[1] == width}
        columns["misses"] = columns["accessed"] - columns["hit"]
        columns["hit_rate"] = columns["hit"] / np.maximum(columns["accessed"], 1)
        rows = []
        for step, layer in np.ndindex(columns["accessed"].shape):
            place = {"step": step} | ({"layer": layer} if by == "layer" else {})
            rows.append(
                place | {name: value[step, layer].item() for name, value in columns.items()}
            )
        return frame(rows)

    def save(self, path: str | Path) -> None:
        """Write one .npz; it appears whole or not at all."""
        path = Path(path)
        arrays = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if isinstance(getattr(self, f.name), np.ndarray)
        }
        header = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in arrays}
        header["format_version"] = FORMAT_VERSION
        with replacing(path) as beside, beside.open("wb") as file:
            np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)

    def check(self) -> None:
        """Raise ValueError where a field is of another kind, or an array of another shape, than the
        ledger's own sizes say.
        """
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and (type(value) is not int or value < 0):
                raise ValueError(f"{f.name} is no count")
            if f.type == "str" and not isinstance(value, str):
                raise ValueError(f"{f.name} is no text")
            if f.type == "np.ndarray" and (
                not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf"
            ):
                raise ValueError(f"{f.name} is no array of numbers")
        shapes = {"T": self.n_steps, "L": self.n_layers, "G": self.n_groups}
        for name, axes in AXES.items():
            found = getattr(self, name).shape
            if found != tuple(shapes[axis] for axis in axes):
                raise ValueError(f"{name} has shape {list(found)}")
        for name in ("mass_total", "mass_kept", "heaviest_lost", "set_overlap"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} holds a value that is not finite")
        if not isinstance(self.params, dict) or not self.granularity >= 1:
            raise ValueError("params or granularity cannot be")

    @classmethod
    def load(cls, path: str | Path) -> Ledger:
        """Read what `save` wrote.

        Raises FmsimError for a file that is missing, truncated, foreign or of another version.
        """
        try:
            arrays = read_npz(Path(path))
            header = strict_json.parse(str(arrays.pop("header")), f"{path}: header")
            if not isinstance(header, dict):
                raise ValueError("its header is no JSON object")
        except FileNotFoundError:
            raise FmsimError(f"{path}: no such ledger file") from None
        except (*DAMAGED, KeyError) as error:
            raise FmsimError(
                f"{path}: not a whole fmsim ledger ({error}); run the scenario again with --out"
            ) from None
        version = header.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise FmsimError(
                f"{path}: ledger format {version}, but this fmsim reads {FORMAT_VERSION}; run the"
                " scenario again"
            )
        try:
            values: dict[str, Any] = header | arrays
            ledger = cls(**values)
            ledger.check()
            return ledger
        except (TypeError, ValueError) as error:
            raise FmsimError(
                f"{path}: ledger fields do not match ({error}); run the scenario again"
            ) from None
