"""How much GPU memory a policy may fill: in bytes that a request takes there, or in entries."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pydantic_core import core_schema

from fmsim.errors import FmsimError, short
from fmsim.units import BYTE_UNITS

MOST = 10**15  # of any unit
GRAMMAR = re.compile(
    r"(?P<number>\d+(?:\.\d+)?|\.\d+)\s*"
    r"(?P<unit>(?:%|[kmgt]?i?b)(?P<gpu>\s*gpu)?|x\s*topk|entries|entry)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Budget:
    """An amount of compressed KV.

    `unit` is one of
    - "gpu share": share of the bytes that the full cache takes on the GPU ("12.5% gpu", amount
      0.125): the policy gets as many slots as leave all of the request within it, its index keys,
      spare pages, dense entries and windows included;
    - "gpu bytes": the same in bytes ("0.25 GiB gpu");
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
                f"budget {short(text)} is not understood; write e.g. '12.5% gpu', '0.25 GiB gpu',"
                " '12 GiB', '4096 entries', '10%' or '2x topk'"
            )
        number = Decimal(match["number"])
        unit = "".join(match["unit"].upper().split()).removesuffix("GPU")
        on_gpu = "gpu " if match["gpu"] else ""
        if not 0 < number <= MOST:
            raise ValueError(f"budget {short(text)} must be above zero, and at most {MOST:g}")
        if unit == "%":
            return cls(float(number / 100), f"{on_gpu}share")
        if unit == "XTOPK":
            return cls(float(number), "topk")
        if unit in ("ENTRIES", "ENTRY"):
            return cls(float(number), "entries")
        return cls(float(number * BYTE_UNITS[unit]), f"{on_gpu}bytes")

    @property
    def on_gpu(self) -> bool:
        """It is in bytes on the GPU: what slots it leaves depends on what else the policy needs."""
        return self.unit.startswith("gpu")

    def gpu_bytes(self, full_bytes: int) -> int:
        """Of a budget on the GPU, where the full cache takes `full_bytes`."""
        return math.floor(self.amount * (full_bytes if self.unit == "gpu share" else 1))

    def entries(
        self,
        *,
        prompt_entries: int,
        topk: int,
        entry_bytes: float,
        model_layers: int,
        gpu_entries: int | None = None,
    ) -> float:
        """Entries in each CSA layer: `entry_bytes` is the KV of one entry in one of `model_layers`
        layers, and `gpu_entries` what a budget on the GPU was solved for
        (`fmsim.replay.context`). Raises FmsimError for such a budget where that is not known.
        """
        if self.on_gpu:
            if gpu_entries is None:
                raise FmsimError(
                    f"budget {self}: which model's bytes? Name one, or give entries or a share"
                )
            return gpu_entries
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
        gpu = " gpu" if self.on_gpu else ""
        if self.unit in ("share", "gpu share"):
            return f"{_plain(amount * 100)}%{gpu}"
        if self.unit == "topk":
            return f"{_plain(amount)}x topk"
        if self.unit == "entries":
            return f"{_plain(amount)} entries"
        unit = next(
            (name for name in ("TiB", "GiB", "MiB", "KiB") if amount >= BYTE_UNITS[name.upper()]),
            "B",
        )
        return f"{_plain(amount / BYTE_UNITS[unit.upper()])} {unit}{gpu}"

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
