"""docs/reference/commands-*.md: every command, argument and option, from the commands."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from describe import item, one_line, section, wrapped

from fmsim import cli

# Named in their order; a command that no page names is an error.
PAGES = {
    "commands-run": ("run", "sweep", "tune", "compare", "report"),
    "commands-plan": ("plan", "init", "schema", "doctor", "scenario", "model", "policy"),
    "commands-engine": ("exec", "validate", "eval", "hw"),
    "commands-trace": ("trace", "indexer"),
}
WORDS = {int: "whole number", float: "number", Path: "path"}
EXAMPLES = re.compile(r"\x08\n(.*?)(?:\n\n|\Z)", re.DOTALL)


def page(name: str) -> str:
    """The commands of one page."""
    found = commands()
    left = set(found) - {command for names in PAGES.values() for command in names}
    if left:
        raise ValueError(f"PAGES of {__file__}: name a page for {', '.join(sorted(left))}")
    parts = []
    for command in PAGES[name]:
        parts += described((command,), found[command])
    return "\n".join(parts)


def commands() -> dict[str, Any]:
    """By name what `fmsim --help` lists: commands, and groups of commands."""
    program = typer.main.get_command(cli.program(cli.EVERY))
    found: dict[str, Any] = program.commands  # type: ignore[attr-defined]
    return found


def described(path: tuple[str, ...], command: Any) -> Iterator[str]:
    """A section of the command; of a group, its own sentence and a section of each command."""
    name = " ".join(path)
    if inner := getattr(command, "commands", None):
        yield section(f"`fmsim {name}`", one_line(command.help or ""), iter(())).rstrip("\n") + "\n"
        for each in inner.values():
            yield from described((*path, each.name), each)
        return
    text = (command.help or "").partition("\f")[0]
    examples = [line for found in EXAMPLES.findall(text) for line in found.splitlines()]
    prose = [one_line(part) for part in EXAMPLES.sub("\n\n", text).split("\n\n")]
    body = "\n\n".join(wrapped(part) for part in prose if part)
    if examples:
        body += "\n\n```bash\n" + "\n".join(examples) + "\n```"
    items = "".join(parameters(command.params))
    yield f"{'#' * (len(path) + 1)} `fmsim {name}`\n\n{body}\n\n{items}"


def parameters(params: Sequence[Any]) -> Iterator[str]:
    """A list item an argument or option."""
    for param in params:
        if param.hidden or param.name == "help":
            continue
        names = [*param.opts, *param.secondary_opts]
        if not names[0].startswith("-"):
            names = [names[0].upper()]
        head = ", ".join(f"`{name}`" for name in names)
        said = ", ".join(filter(None, [kind_of(param), repeat(param), default_of(param)]))
        yield item(f"{head}" + (f" ({said})" if said else ""), one_line(param.help or ""))


def kind_of(param: Any) -> str:
    """What is to be written: nothing for a switch, else a type, its bounds, or its words."""
    kind = param.type_descriptor.annotation
    if get_origin(kind) is list:
        [kind] = get_args(kind)
    if kind is bool:
        return ""
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return " or ".join(f"`{word.value}`" for word in kind)
    info = param.type_descriptor.parameter_info
    low_high = "".join(
        f" {word} {value:,.10g}"
        for word, value in (("from", info.min), ("to", info.max))
        if value is not None
    )
    return WORDS.get(kind, "text") + low_high


def repeat(param: Any) -> str:
    return "repeat for more" if param.multiple or param.nargs == -1 else ""


def default_of(param: Any) -> str:
    if param.required:
        return "required"
    value = param.default
    if value in (None, (), [], False, "") or callable(value):
        return ""
    if isinstance(value, (list, tuple)):
        return "default " + " ".join(f"`{part}`" for part in value)
    return f"default `{getattr(value, 'value', value)}`"
