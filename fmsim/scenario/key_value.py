"""KEY=VALUE, as options of the command line take it."""

from __future__ import annotations

from fmsim.errors import FmsimError


def key_value(text: str, otherwise: str) -> tuple[str, str]:
    """The key and the value of KEY=VALUE, without blanks around; the value may hold further "=".

    Raises FmsimError, which says ``otherwise``, where there is no key or no "=".
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise FmsimError(otherwise)
    return key.strip(), value.strip()
