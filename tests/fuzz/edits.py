"""Structured damage: texts, JSON values and bytes with a few places changed."""

from __future__ import annotations

import random
import struct
from typing import Any

VALUES = [
    "null",
    "true",
    "yes",
    "0",
    "-1",
    "1",
    "1.9",
    "0777",
    "12:30:45",
    "2021-13-45",
    "1e308",
    "1e-308",
    ".inf",
    ".nan",
    "1e999",
    "[]",
    "{}",
    "[[]]",
    "''",
    "'1'",
    "9223372036854775808",
    "-9223372036854775809",
    "100000000000000000000000000000000",
    "!!float",
    "a",
    "&x",
    "*x",
    '"\\e[31m"',
    "../../etc/passwd",
    "/dev/zero",
    "h200",
    "lsa",
    "random",
    "belady",
    "5%",
    "3x",
    "topk",
    "[1,2]",
    "[2,1]",
    "{a:",
    "1}",
    "true:",
    "&a",
    "[*a]",
]


def edited_text(text: str, chance: random.Random) -> str:
    """One to three edits: a value replaced, a line dropped, doubled or moved, a character."""
    for _ in range(chance.randint(1, 3)):
        lines = text.split("\n")
        at = chance.randrange(len(lines))
        kind = chance.randrange(7)
        if kind <= 2:
            parts = text.replace("{", " { ").replace("}", " } ").replace(",", " , ").split(" ")
            parts[chance.randrange(len(parts))] = chance.choice(VALUES)
            text = " ".join(parts)
        elif kind == 3:
            text = "\n".join(lines[:at] + lines[at + 1 :])
        elif kind == 4:
            text = "\n".join([*lines[:at], lines[at], *lines[at:]])
        elif kind == 5:
            place = chance.randrange(len(text) + 1)
            odd = chance.choice("\x00\t{}[]:,&*!|>%@`\"'\\\u2028é\x1b0-")
            text = text[:place] + odd + text[place:]
        else:
            text = text[: chance.randrange(len(text) + 1)]
    return text


def edited_value(value: Any, chance: random.Random) -> Any:
    """A JSON value with one place changed."""
    odd = chance.choice(
        [None, True, -1, 0, 1.9, 1e308, 10**30, "", "x" * 300, [], {}, [[1]], "\x1b[31m", 3]
    )
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        changed = dict(value)
        if chance.random() < 0.15:
            del changed[key]
        else:
            changed[key] = edited_value(value[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        return [*value[:at], edited_value(value[at], chance), *value[at + 1 :]]
    return odd


def edited_bytes(data: bytes, chance: random.Random) -> bytes:
    """One to four edits: a bit turned, a number overwritten, a few bytes cut out."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        kind = chance.randrange(3)
        at = chance.randrange(max(1, min(len(changed), chance.choice([16, 2000, 10**9]))))
        if not changed:
            break
        if kind == 0:
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            changed[at : at + 8] = struct.pack("<Q", chance.choice([0, 1, 2**31, 2**62, 2**64 - 1]))
        else:
            del changed[at : at + chance.randint(1, 64)]
    return bytes(changed)
