"""The errors that a user is shown, and what a command's exit code says.

docs/reference/errors.md has the table of exit codes for users.
"""

import enum


class ExitCode(enum.IntEnum):
    """What a command's end means."""

    DONE = 0
    FAILED = 1  # a policy failed, two worlds differ (`fmsim validate`), or nothing fits
    INPUT = 2  # the user's input: a file, an option, the environment
    BUG = 70  # a bug in fmsim
    INTERRUPTED = 130  # Ctrl-C, or SIGTERM


class FmsimError(Exception):
    """A mistake of the user or a bad input; the message names the file, the key and the fix."""

    exit_code = ExitCode.INPUT


class BadParameter(FmsimError):
    """A policy has no such parameter, or the value is none of it."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key  # of the parameter, or "policy"


class PolicyError(FmsimError):
    """A policy misbehaved; the message names it, the step, and what it did."""

    exit_code = ExitCode.FAILED


class DoesNotFit(FmsimError):
    """Weights or KV are larger than the memory that is simulated."""

    exit_code = ExitCode.FAILED


class BudgetTooSmall(DoesNotFit):
    """A budget in bytes on the GPU is exceeded before a policy's first page."""

    least_bytes = 0  # that it takes with its first page


class FmsimWarning(UserWarning):
    """What goes on without, such as a plug-in that cannot be imported; the message names it."""


def shown(text: object) -> str:
    """`text` as it can be printed on any terminal: control characters, escape sequences and lone
    surrogates are shown escaped, line breaks too.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in str(text)
    )


def short(value: object, most: int = 60) -> str:
    """The value's repr, cut where it is long; a huge nested value is never spelled out whole."""
    if isinstance(value, (list, tuple, dict)) and len(value) > most:
        return f"a {type(value).__name__} of {len(value)}"
    text = shown(repr(value))
    return text if len(text) <= most else text[: most - 3] + "..."
