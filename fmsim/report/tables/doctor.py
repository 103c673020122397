"""What `fmsim doctor` found, in a few lines each."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from fmsim.report.grid import Field, Grid, View, show_parts
from fmsim.units import gib


def show(found: dict[str, Any]) -> None:
    """Print to standard output."""
    head = (
        f"fmsim {found['fmsim']}, Python {found['python']}, {found['system']}, {found['cores']}"
        f" cores; {len(found['scenarios'])} scenarios (fmsim scenario list)"
    )
    extras = Grid([Field("extra", 0, "left"), Field("packages", 0, "left")])
    for name, packages in found["extras"].items():
        for package, version in packages.items():
            mark = Text(f"{package} {version}") if version else Text(f"{package}: none", "yellow")
            extras.add(name, mark)
            name = ""
    gpus = [
        Text(f"GPU {n}: {gpu['name']}, {gib(gpu['bytes'])}, compute capability {gpu['capability']}")
        for n, gpu in enumerate(found["gpus"])
    ] or [Text(f"no GPU: {found['why_no_gpu']}")]
    tasks = [_line(task) for task in found["tasks"]]
    show_parts([Text(head), extras, *gpus, Text(), *tasks], View.of_terminal())


def _line(task: dict[str, Any]) -> Text:
    if task["runs"]:
        return Text.assemble(("yes  ", "green"), task["what"])
    return Text.assemble(("no   ", "red"), f"{task['what']}\n     {task['fix']}")
