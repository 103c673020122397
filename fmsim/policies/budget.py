"""How much GPU memory a policy may fill: bytes, entries, a share of the history, or a multiple of
top-k.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pydantic_core import core_schema

from fmsim.errors import short
from fmsim.units import BYTE_UNITS

MOST = 10**15  # of any unit
GRAMMAR = re.compile(
    r"(?P<number>\d+(?:\.\d+)?|\.\d+)\s*(?P<unit>%|x\s*topk|entries|entry|[kmgt]?i?b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Budget:
    """An amount of compressed KV.

    `unit` is one of
    - "bytes": KV bytes of all CSA layers of the simulated model together ("12 GiB", "500 MB");
    - "entries": entries in each CSA layer ("4096 entries");
    - "share": share of the prompt's entries, in each layer ("10%", amount 0.1);
    - "topk": multiple of the model's top-k, in each layer ("2x topk", amount 2).
    """

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str | Budget) -> Budget:
        """Read the grammar above.

        Raises ValueError (a pydantic error inside a model) when it does not match.
        """
        if isinstance(text, Budget):
            return text
        match = GRAMMAR.fullmatch(str(text).strip())
        if match is None:
            raise ValueError(
                f"budget {short(text)} is not understood; write e.g. '12 GiB', '4096 entries',"
                " '10%' or '2x topk'"
            )
        number, unit = Decimal(match["number"]), "".join(match["unit"].upper().split())
        if not 0 < number <= MOST:
            raise ValueError(f"budget {short(text)} must be above zero, and at most {MOST:g}")
        if unit == "%":
            return cls(float(number / 100), "share")
        if unit == "XTOPK":
            return cls(float(number), "topk")
        if unit in ("ENTRIES", "ENTRY"):
            return cls(float(number), "entries")
        return cls(float(number * BYTE_UNITS[unit]), "bytes")

    def entries(
        self, *, prompt_entries: int, topk: int, entry_bytes: float, model_layers: int
    ) -> float:
        """Entries in each CSA layer: `entry_bytes` is the KV of one entry in one of `model_layers`
        layers.
        """
        per_unit = {
            "bytes": 1 / (entry_bytes * model_layers),
            "entries": 1.0,
            "share": float(prompt_entries),
            "topk": float(topk),
        }
        return self.amount * per_unit[self.unit]

    def slots(self, granularity: int, **sizes: Any) -> int:
        """Whole slots of `granularity` entries in each layer (or for all layers, where they share);
        at least one.

        `sizes` are the arguments of `entries`. Rounds down, so that the budget is never exceeded by
        a fraction of a slot.
        """
        return max(1, math.floor(self.entries(**sizes) / granularity + 1e-9))

    def __str__(self) -> str:
        """Text that `parse` reads back to the same budget."""
        amount = Decimal(repr(float(self.amount)))
        if self.unit == "share":
            return f"{_plain(amount * 100)}%"
        if self.unit == "topk":
            return f"{_plain(amount)}x topk"
        if self.unit == "entries":
            return f"{_plain(amount)} entries"
        unit = next(
            (name for name in ("TiB", "GiB", "MiB", "KiB") if amount >= BYTE_UNITS[name.upper()]),
            "B",
        )
        return f"{_plain(amount / BYTE_UNITS[unit.upper()])} {unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Lets a pydantic model say `budget: Budget` and take the text form; it serialises back to
        text.
        """
        return core_schema.no_info_before_validator_function(
            cls.parse,
            core_schema.is_instance_schema(cls),
            serialization=core_schema.plain_serializer_function_ser_schema(str),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, str]:
        return {"type": "string", "title": "Budget"}


def _plain(number: Decimal) -> str:
    """Digits without an exponent and without trailing zeros."""
    return f"{number.normalize():f}"
