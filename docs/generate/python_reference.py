"""docs/reference/python.md: what `import fmsim` offers, from signatures and docstrings."""

from __future__ import annotations

import inspect
import textwrap

from describe import one_line, wrapped

import fmsim


def names() -> str:
    """Functions with their signatures, then classes."""
    public = {name: getattr(fmsim, name) for name in fmsim.__all__}
    functions = {name: found for name, found in public.items() if inspect.isfunction(found)}
    lines = ["## Functions", ""]
    for name, found in functions.items():
        lines += [f"### `{name}`", "", "```python", signature(name, found), *example(found)]
        lines += ["```", "", wrapped(prose(found)), ""]
    lines += ["## Classes", ""]
    for name, found in public.items():
        if name not in functions:
            lines += [wrapped(f"- `{name}`: {prose(found)}", indent="  ")]
    return "\n".join(lines) + "\n"


def signature(name: str, found: object) -> str:
    """The call as it is written, in lines of 80 columns."""
    said = inspect.signature(found)  # type: ignore[arg-type]
    parts: list[str] = []
    for param in said.parameters.values():
        if param.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        default = "" if param.default is inspect.Parameter.empty else f"={_shown(param.default)}"
        star = "**" if param.kind is inspect.Parameter.VAR_KEYWORD else ""
        parts.append(f"{star}{param.name}{default}")
    lines = textwrap.wrap(
        f"fmsim.{name}({', '.join(parts)})",
        80,
        subsequent_indent=" " * 4,
        break_on_hyphens=False,
    )
    return "\n".join(lines)


def _shown(default: object) -> str:
    return getattr(default, "__name__", None) or repr(default)


def prose(found: object) -> str:
    """The docstring's first paragraphs, without its example."""
    text = inspect.cleandoc(found.__doc__ or "").partition(">>>")[0]
    return one_line(text) if inspect.isfunction(found) else one_line(text.partition("\n\n")[0])


def example(found: object) -> list[str]:
    """The docstring's example, which the tests run."""
    _, begin, rest = inspect.cleandoc(found.__doc__ or "").partition(">>>")
    return [begin + rest] if begin else []
