"""The marked code blocks of tutorials and how-to pages run, page by page, in an empty folder.

<!-- file: NAME -->   the block below is that file
<!-- runs -->         the block below is run as bash runs it, and must end with 0
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command import fmsim_here

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted((ROOT / "docs/tutorial").glob("*.md")),
    *sorted((ROOT / "docs/how-to").glob("*.md")),
]
BLOCK = re.compile(
    r"^<!-- (?:(?P<runs>runs)|file: (?P<file>[\w.-]+)) -->\n```\w+\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
NEEDS = {  # extras of `test`, which somebody may do without
    "report": "plotly",
    "tune": "optuna",
    ".parquet": "pyarrow",
    "exec": "torch",
    "to_frame": "pandas",
}
LONGEST_S = 300
QUOTED = re.compile(r'"[^"]*"')
# What a shell does more than to part words: outside double quotes, and within them.
SHELLS = re.compile(r"""[(){}*?~'`$#!"|&;<\[\]]|\\(?!\n)|(?<! )>|>(?! )""")
EXPANDED = re.compile(r"[`\\!$]")
MORE_THAN_WORDS = """
-p lru(window=3)
`date`
$(date)
$HOME
'$HOME'
"$PWD"
"`date`"
-g batch={1,2}
*.yaml
?.yaml
~/a
a\\ b
"a
a; ls
a&&ls
>a
2>&1
""".splitlines()[1:]


def blocks(page):
    return list(BLOCK.finditer(page.read_text(encoding="utf-8")))


def test_every_tutorial_has_commands_that_run():
    without = [page.name for page in PAGES if not blocks(page) and page.parent.name == "tutorial"]
    assert not without


def test_a_mark_stands_right_above_its_block():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        marks = re.findall(r"^<!-- (?:runs|file: .*) -->$", text, re.MULTILINE)
        assert len(marks) == len(blocks(page)), page.name


def calls(text):
    """The arguments of each line and the file that it prints into, where all lines call fmsim and
    nothing else, in words that are the same to bash and to shlex; or None.
    """
    if SHELLS.search(QUOTED.sub("", text)) or any(map(EXPANDED.search, QUOTED.findall(text))):
        return None
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        into = words.pop() if words[-2:-1] == [">"] else None
        words = words[:-1] if into else words
        if words[:1] != ["fmsim"] or ">" in words:
            return None
        found.append((words[1:], into))
    return found


@pytest.mark.parametrize("words", MORE_THAN_WORDS)
def test_bash_runs_what_is_more_than_words(words):
    assert calls(f"fmsim run {words}\n") is None
    assert calls(f"fmsim run a\nfmsim run {words}\n") is None


def test_words_need_no_bash():
    text = 'fmsim run "/t/a b" \\\n  --set "policies.*.budget=5%"\nfmsim doctor > a.txt\n'
    assert calls(text) == [
        (["run", "/t/a b", "--set", "policies.*.budget=5%"], None),
        (["doctor"], "a.txt"),
    ]


@pytest.fixture
def shell(tmp_path):
    """Runs a text in an empty folder where `fmsim` and `python` are this checkout's: by bash, or
    without new processes where it only calls fmsim, whose start takes a second.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, does in (("fmsim", '-c "from fmsim.cli import main; main()"'), ("python", "")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {does} "$@"\n')
        program.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    known = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(work)]),
        "COLUMNS": "80",
    }

    def run(text):
        found = calls(text)
        if found is None:
            return by_bash(text)
        for arguments, into in found:
            done = fmsim_here(*arguments, folder=work)
            if into:
                (work / into).write_text(done.stdout, encoding="utf-8")
            if done.returncode:
                break
        return done

    def by_bash(text):
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=work,
            env=known,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
        )

    run.folder = work
    return run


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda p: p.stem)
def test_the_page_runs(page, shell):
    for block in blocks(page):
        text = block["text"]
        if block["file"]:
            (shell.folder / block["file"]).write_text(text, encoding="utf-8")
            continue
        for word, module in NEEDS.items():
            if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text):
                pytest.importorskip(module)
        done = shell(text)
        line = page.read_text(encoding="utf-8")[: block.start()].count("\n") + 1
        where = f"{page.relative_to(ROOT)}, line {line}"
        assert done.returncode == 0, f"{where}:\n{text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
