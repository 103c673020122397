"""FlashMemory's training dumps (github.com/libertywing/FlashMemory-Deepseek-V4) as traces;
`flashmemory_writer` writes them.

A dump is a pickled dict of tensors, ``doc_00000.pkl``, one a document. Row t is one decode token:

    hidden_layer_{c}     bfloat16 [T, H]   attention input of the model's CSA layer c, from 0
    positions_layer_{c}  int64 [T]         its absolute position
    compk_layer_{c}      uint8 [P, D + 4]  an entry's index key: D float8 codes, its float32 scale
    label_indices        int32 [N]         golden entries of all rows
    label_scores         int32 [N]         how many of the model's CSA layers chose each
    label_pointers       int32 [T + 1]     row t's labels are [pointers[t], pointers[t + 1])

A dump does not say what a layer attended to, nor how much: it says for each token which entries
were golden, and by how many layers. docs/how-to/record-a-trace.md says what that means in a trace;
``Trace.holds_labels`` is true of such a one.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmsim.errors import FmsimError
from fmsim.trace.format import ENTRY_TOKENS, LABELS, TAU, ModelInfo, Trace, TraceHeader
from fmsim.trace.importers import tensor_pickle

SCALE_BYTES = 4
METADATA_FILE, HEADER_KEY = "server_metadata.jsonl", "fmsim_trace"
# What the dumping server's model is, since a dump does not say: DeepSeek-V4-Flash, whose CSA layers
# are every second from layer 2.
TRAINER_WIDTHS = (
    4096,
    128,
)  # hidden and key widths of FlashMemory's trainer, which are not parameters there
FIRST_CSA_LAYER, CSA_STEP = 2, 2
PUBLISHED = {
    "model_type": "deepseek_v4",
    "index_topk": 512,
    "index_n_heads": 64,
    "rope_dims": 64,
    "index_hadamard": True,
    "label_layers": 21,
    "compress_rope": {
        "rope_type": "yarn",
        "rope_theta": 160_000.0,
        "factor": 16,
        "original_max_position_embeddings": 65_536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}


class Votes(NamedTuple):
    """Golden entries of one token: ids int32 [n] ascending, and how many layers chose each, int32
    [n].
    """

    ids: np.ndarray
    layers: np.ndarray


def documents(folder: Path) -> list[Path]:
    """The dumps of a folder in order; FmsimError where there is none."""
    found = sorted(folder.glob("doc_*.pkl"))
    if not found:
        raise FmsimError(
            f"{folder}: holds no doc_*.pkl; give the folder that FlashMemory's"
            " run_dump_training_data.py wrote"
        )
    return found


def read_document(path: Path, tau: int = TAU) -> Trace:
    """One dump as a trace.

    Its first row is the query of window 0, so it counts as the last token of the prompt.

    Raises FmsimError, naming the file, where tensors are missing or contradict each other.
    """
    tensors = tensor_pickle.load(path)
    numbers = sorted(
        int(match[1]) for key in tensors if (match := re.fullmatch(r"hidden_layer_(\d+)", key))
    )
    dump = _Dump(path, tensors, numbers)
    dump.check()
    own = _own_header(path)
    geometry = own["geometry"] if own else dump.geometry()
    if geometry.get("csa_numbers") != numbers or type(geometry.get("label_layers")) is not int:
        dump.fail(f"{METADATA_FILE} describes other layers, or does not say how many voted")
    rows = len(dump.positions) - 1
    prompt_tokens = int(dump.positions[0]) + 1
    votes, dropped = dump.votes(geometry["label_layers"])
    keys, scales, unkeyed = dump.keys((prompt_tokens + rows) // ENTRY_TOKENS)
    ids, share = _padded(votes[1:], geometry["label_layers"])
    shape = (rows, len(numbers))
    header: dict[str, Any] = {
        "model": ModelInfo(name="not said by the dump", dtype="bfloat16"),
        "prompt_kind": "flashmemory",
        "prompt_text": f"{path.name}: golden labels, not attention; the text is not in the dump",
        "seed": 0,
        "device": "not said",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    } | (own or {})
    header |= {
        "geometry": geometry,
        "source": LABELS,
        "prompt_tokens": prompt_tokens,
        "tau": tau,
        "prompt_mass_queries": 0,
    }
    header["quality"] = {
        "labels": int(sum(len(row.ids) for row in votes[1:])),
        "labels_dropped": dropped,
        "entries_without_keys": unkeyed,
    }
    return Trace(
        header=TraceHeader(**header),
        entry_ids=np.repeat(ids[:, None], len(numbers), axis=1),
        mass=np.repeat(share[:, None], len(numbers), axis=1),
        window_mass=np.zeros(shape, np.float32),
        sink_mass=np.zeros(shape, np.float32),
        token_ids=None,
        forced=np.zeros(rows, bool),
        hidden=dump.hidden(np.arange(0, rows, tau)),
        index_keys=keys,
        index_key_scales=scales,
    )


class _Dump(NamedTuple):
    """A document's tensors, and the numbers of its CSA layers."""

    path: Path
    tensors: dict[str, np.ndarray]
    numbers: list[int]

    @property
    def positions(self) -> np.ndarray:
        return self.tensors[f"positions_layer_{self.numbers[0]}"]

    def fail(self, what: str) -> None:
        raise FmsimError(f"{self.path}: {what}; dump it again, or leave it out")

    def check(self) -> None:
        """Shapes and types that contradict each other or the format."""
        if not self.numbers:
            self.fail("holds no hidden_layer_*")
        wanted = {
            f"{kind}_layer_{number}"
            for kind in ("hidden", "positions", "compk")
            for number in self.numbers
        }
        missing = sorted(
            (wanted | {"label_indices", "label_scores", "label_pointers"}) - self.tensors.keys()
        )
        if missing:
            self.fail(f"lacks {', '.join(missing)}")
        rows = len(self.positions)
        if rows < 2:
            self.fail(f"holds {rows} decode tokens, a trace needs two")
        for number in self.numbers:
            hidden, keys, positions = (
                self.tensors[f"{kind}_layer_{number}"] for kind in ("hidden", "compk", "positions")
            )
            if (
                hidden.ndim != 2
                or hidden.dtype.kind != "f"
                or len(hidden) != rows
                or hidden.shape[1] != self._of_first("hidden").shape[1]
            ):
                self.fail(
                    f"hidden_layer_{number} is {hidden.dtype} {list(hidden.shape)}, not floats"
                    f" [{rows}, {self._of_first('hidden').shape[-1]}]"
                )
            if (
                keys.ndim != 2
                or keys.dtype != np.uint8
                or keys.shape != self._of_first("compk").shape
                or keys.shape[1] <= SCALE_BYTES
            ):
                self.fail(
                    f"compk_layer_{number} is {keys.dtype} {list(keys.shape)}, not uint8 [entries,"
                    " key width + 4] as in every layer"
                )
            if (
                not np.array_equal(positions, positions[0] + np.arange(rows))
                or positions[0] < 0
                or not np.array_equal(positions, self.positions)
            ):
                self.fail(
                    f"positions_layer_{number} do not rise by one, or differ from another layer's"
                )
        self._check_labels(rows)

    def _of_first(self, kind: str) -> np.ndarray:
        return self.tensors[f"{kind}_layer_{self.numbers[0]}"]

    def _check_labels(self, rows: int) -> None:
        indices, scores, pointers = (
            self.tensors[f"label_{kind}"] for kind in ("indices", "scores", "pointers")
        )
        if any(
            part.ndim != 1 or part.dtype.kind not in "iu" for part in (indices, scores, pointers)
        ) or len(indices) != len(scores):
            self.fail(
                "label_indices, label_scores and label_pointers are not lists of integers, the"
                " first two equally long"
            )
        if (
            len(pointers) != rows + 1
            or pointers[0] != 0
            or pointers[-1] != len(indices)
            or (np.diff(pointers) < 0).any()
        ):
            self.fail(f"label_pointers are not {rows + 1} rising numbers from 0 to {len(indices)}")
        if len(indices) and (indices.min() < 0 or scores.min() < 1):
            self.fail("a label's index is negative, or its score below 1")

    def geometry(self) -> dict[str, Any]:
        """DeepSeek-V4-Flash's, at the dump's hidden width."""
        width = self._of_first("compk").shape[1] - SCALE_BYTES
        if width != TRAINER_WIDTHS[1]:
            self.fail(
                f"its keys are {width} wide, DeepSeek-V4's are {TRAINER_WIDTHS[1]}, and no"
                f" {METADATA_FILE} says what model this is"
            )
        layers = [FIRST_CSA_LAYER + CSA_STEP * number for number in self.numbers]
        widths = {"hidden_size": self._of_first("hidden").shape[1], "index_head_dim": width}
        return PUBLISHED | widths | {"csa_layers": layers, "csa_numbers": self.numbers}

    def votes(self, voters: int) -> tuple[list[Votes], int]:
        """Each row's labels, ascending, the highest score of an entry that stands twice; and how
        many were no entry yet at that token.
        """
        indices, scores, pointers = (
            self.tensors[f"label_{kind}"] for kind in ("indices", "scores", "pointers")
        )
        if len(scores) and scores.max() > voters:
            self.fail(f"a label's score is {scores.max()}, but the model has {voters} CSA layers")
        rows, dropped = [], 0
        for row, position in enumerate(self.positions.tolist()):
            span = slice(pointers[row], pointers[row + 1])
            order = np.lexsort((-scores[span], indices[span]))
            ids, first = np.unique(indices[span][order], return_index=True)
            seen = ids < (position + 1) // ENTRY_TOKENS
            dropped += int((~seen).sum())
            rows.append(
                Votes(ids[seen].astype(np.int32), scores[span][order][first][seen].astype(np.int32))
            )
        return rows, dropped

    def keys(self, entries: int) -> tuple[np.ndarray, np.ndarray, int]:
        """codes uint8 [L, entries, D], scales float32 [L, entries], and how many entries the dump
        has no key of (zeros, scale 1).
        """
        rows = np.stack(
            [self.tensors[f"compk_layer_{number}"][:entries] for number in self.numbers]
        )
        unkeyed = entries - rows.shape[1]
        codes = np.pad(rows[..., :-SCALE_BYTES], ((0, 0), (0, unkeyed), (0, 0)))
        scales = np.ascontiguousarray(rows[..., -SCALE_BYTES:]).view("<f4")[..., 0]
        return (
            codes,
            np.pad(scales, ((0, 0), (0, unkeyed)), constant_values=1.0).astype(np.float32),
            unkeyed,
        )

    def hidden(self, rows: np.ndarray) -> np.ndarray:
        """float32 [W, L, H]."""
        states = np.stack(
            [self.tensors[f"hidden_layer_{number}"][rows] for number in self.numbers], axis=1
        ).astype(np.float32)
        if not np.isfinite(states).all():
            window = int(np.argwhere(~np.isfinite(states))[0][0])
            self.fail(
                f"row {rows[window]} has no finite hidden state, and is the query of window"
                f" {window}; give the --tau that it was written with"
            )
        return states


def _padded(votes: list[Votes], voters: int) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 [T, K], -1 = padding, and the share of the model's CSA layers that chose each,
    float32 [T, K].
    """
    most = max(1, *(len(row.ids) for row in votes))
    ids, share = np.full((len(votes), most), -1, np.int32), np.zeros((len(votes), most), np.float32)
    for step, row in enumerate(votes):
        ids[step, : len(row.ids)], share[step, : len(row.ids)] = row.ids, row.layers / voters
    return ids, share


def _own_header(path: Path) -> dict[str, Any] | None:
    """The trace header that `flashmemory_writer.write_document` put beside a dump, None where
    another program wrote it.
    """
    listed = path.parent / METADATA_FILE
    if not listed.is_file():
        return None
    try:
        lines = [
            json.loads(line)
            for line in listed.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        found = [
            line[HEADER_KEY]
            for line in lines
            if line.get("filename") == path.name and HEADER_KEY in line
        ]
        return (
            TraceHeader.model_validate(found[-1]).model_dump(exclude={"content_sha256"})
            if found
            else None
        )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise FmsimError(
            f"{listed}: is no list of dumps ({str(error).splitlines()[0]}); mend it or take it away"
        ) from None
