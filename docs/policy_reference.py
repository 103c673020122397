"""Write docs/policy-reference.md's lists: what a policy may say and see, from docstrings.

    python docs/policy_reference.py            writes the lists between the page's two markers
    python docs/policy_reference.py --check    writes nothing; exit status 1 where the page is old

A field's text is the comment beside it or above it.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from fmsim.policies import base, registry
from fmsim.policies.base import PolicyParams
from fmsim.testing import rules

PAGE = Path(__file__).with_name("policy-reference.md")
BEGIN = "<!-- reference: made by docs/policy_reference.py -->"
END = "<!-- end of reference -->"
WIDTH = 100
MEANINGS = {
    "visibility_only": "every page stays on the GPU; nothing is evicted or loaded",
    "evict": "what leaves is gone: no page comes back from the host",
    "hierarchical": "the host keeps a copy of all; pages are loaded back",
    "position": "where a page stands in the text; no attention mass, no index keys",
    "kv_derived": "the stored entries; no attention mass",
    "current_query": "the query of the step",
    "attention_history": "what past steps selected and attended to; no index keys",
    "predicted_future": "a model's guess at what comes, from hidden states and index keys",
    "future": "what will really come: a bound, not for an engine",
    "request": "for a whole request: once, or for all its layers together",
    "step": "at each step, by the same in all layers",
    "layer": "each layer by what it saw itself",
}


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    wanted = with_reference(page, reference())
    if page == wanted:
        return 0
    if "--check" in sys.argv[1:]:
        print(f"docs/{PAGE.name} is old; run python docs/policy_reference.py")
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


def with_reference(page: str, text: str) -> str:
    """The page with `text` between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE}: the markers {BEGIN!r} and {END!r} are not there")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def reference() -> str:
    """All sections."""
    parts = [
        section(
            "Declarations",
            "Class attributes; each must be set. `decision_scope` is for the reader: nothing goes"
            " by it.",
            declarations(),
        ),
        section("Switches", text_of(PolicyParams), switches()),
        section("Methods", text_of(base.Policy), members(base.Policy)),
        section(
            "Of a LookaheadPolicy", text_of(base.LookaheadPolicy), members(base.LookaheadPolicy)
        ),
        section("`ctx`, the context", text_of(base.Context), members(base.Context)),
        section("`obs`, an observation", text_of(base.Observation), members(base.Observation)),
        section("`Pins`", text_of(base.Pins), members(base.Pins)),
    ]
    for name, what in (
        ("LookaheadState", "`ctx.lookahead(window)`"),
        ("Residents", "`ctx.residents`"),
        ("Future", "`ctx.future`"),
    ):
        kind = getattr(base, name)
        parts.append(section(what, text_of(kind), members(kind)))
    parts.append(section("Rules", "What `fmsim.check_policy` runs.", checked_rules()))
    return "\n".join(parts)


def section(title: str, text: str, items: Iterator[str]) -> str:
    return f"## {title}\n\n{textwrap.fill(one_line(text), WIDTH)}\n\n" + "".join(items)


def item(head: str, text: str) -> str:
    """A list item, its text below its head."""
    body = f"- {head}" + (f": {text}" if text else "")
    return textwrap.fill(body, WIDTH, subsequent_indent="  ", break_long_words=False) + "\n"


def declarations() -> Iterator[str]:
    yield item("`name`", "what it is called; letters, digits and hyphens")
    for key, words in registry.DECLARATIONS.items():
        yield item(f"`{key}`", "one of")
        for word in get_args(words):
            yield "  " + item(f"`{word}`", MEANINGS[word]).replace("\n  ", "\n    ")


def switches() -> Iterator[str]:
    """`Params`, as `fmsim policy show` prints them."""
    for key, field in PolicyParams.model_fields.items():
        kind = registry.type_name(field.annotation)
        yield item(f"`{key}` ({kind}, default {field.default})", one_line(field.description or ""))


def checked_rules() -> Iterator[str]:
    for rule in (rules.declarations, rules.parameters, *rules.OF_REPLAYS):
        yield item(f"`{rule.__name__.replace('_', ' ')}`", text_of(rule))


def members(kind: type) -> Iterator[str]:
    """Fields and methods of a class, in the order of its source."""
    source = textwrap.dedent(inspect.getsource(kind))
    [tree] = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    comments = comments_of(source)
    lines = source.splitlines()
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kind_of = ast.unparse(node.annotation)
            declared = node.value is None and "ClassVar" in kind_of  # `declarations` lists them
            if node.target.id.startswith("_") or declared:
                continue
            kind_of = re.sub(r"ClassVar\[(.*)\]", r"\1", kind_of)
            default = f", default {ast.unparse(node.value)}" if node.value is not None else ""
            head = f"`{node.target.id}` ({kind_of}{default})"
            yield item(head, comment_at(node, comments, lines))
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            text = one_line(ast.get_docstring(node) or "")
            if text:  # else as in the class that it extends
                must = " (must be defined)" if "NotImplementedError" in ast.unparse(node) else ""
                yield item(f"`{head_of(node)}`{must}", text)


def head_of(node: ast.FunctionDef) -> str:
    """A method as it is called, or a property's name."""
    if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
        return node.name
    names = [arg.arg for arg in node.args.args if arg.arg != "self"]
    defaults = [ast.unparse(default) for default in node.args.defaults]
    for place, default in enumerate(defaults, len(names) - len(defaults)):
        names[place] += f"={default}"
    if node.args.kwarg:
        names.append(f"**{node.args.kwarg.arg}")
    return f"{node.name}({', '.join(names)})"


def comments_of(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def comment_at(node: ast.AnnAssign, comments: dict[int, str], lines: list[str]) -> str:
    """The comments on the field's own lines, or on the lines above it."""
    last = node.end_lineno or node.lineno
    while last < len(lines) and lines[last].strip() == ")":
        last += 1
    found = [comments[line] for line in range(node.lineno, last + 1) if line in comments]
    line = node.lineno - 1
    while not found or line in comments:
        if line not in comments or not lines[line - 1].strip().startswith("#"):
            break
        found.insert(0, comments[line])
        line -= 1
    return one_line(" ".join(found))


def text_of(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "").replace("\n\n", " ")


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


if __name__ == "__main__":
    sys.exit(main())
