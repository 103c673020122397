"""Progress on a terminal, and where none is."""

import os
import pty
import subprocess
import sys
import time

import pytest
from command import fmsim

from fmsim.cli import progress


def test_a_pipe_gets_a_line_now_and_then(monkeypatch):
    now_s, written = [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(progress.os, "write", lambda place, text: written.append((place, text)))
    lines = progress.PlainLines("reading", None, " tokens")
    for done in (500, 1000, 1250, 1500):
        now_s[0] += 3
        lines.show("reading and decoding", done, 3000)
        lines.tick()
    first = b"reading and decoding: 1,000 of 3,000 tokens (33%) in 6 s, about 12 s left\n"
    second = b"reading and decoding: 1,500 of 3,000 tokens (50%) in 12 s, about 18 s left\n"
    assert written == [(2, first), (2, second)]


def test_half_a_policy_counts_and_what_is_not_known_is_not_said(monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    lines = progress.PlainLines("reading the trace", None)
    assert lines.line(7.0) == "reading the trace: 7 s"
    lines.show("lru", 0.5, 4)
    assert lines.line(2.0) == "lru: 0 of 4 (12%) in 2 s, about 14 s left"


def test_lines_come_while_one_step_takes_long(monkeypatch, capfd):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    lines = progress.PlainLines("waiting", None, every_s=0.0)
    with progress._ticking(lines.tick, 0.01):
        while not capfd.readouterr().err.startswith("waiting: 0 s"):
            time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_bar_and_a_pipe_the_log():
    ours, theirs = pty.openpty()
    code = "from fmsim.cli import main; main()"
    command = [sys.executable, "-c", code, "run", "32k", "-p", "lru", "--json"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    drawn = b""
    try:
        while part := os.read(ours, 4096):
            drawn += part
    except OSError:  # the other end is closed
        pass
    assert running.stdout.read().startswith(b"{") and running.wait() == 0
    assert b"reading the trace" in drawn and b"lru" in drawn and b" of 4" in drawn
    logged = fmsim("run", "32k", "-p", "recency", "-v", "--json").stderr
    assert "258 steps of" in logged and "recency 40% gpu ended after" in logged
    assert " ms  " in logged.splitlines()[0]
