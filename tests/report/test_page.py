"""`fmsim report`: the page in a real browser, what stands in it, and what is told when something is
missing.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest
from command import fmsim, fmsim_here
from made_trace import make_trace

from fmsim.errors import FmsimError
from fmsim.experiments.results import Results
from fmsim.report.page import SECTIONS
from fmsim.trace import write

SCENARIO = """\
name: small & <made>
description: a trace made for a test
trace: small.safetensors
policies:
  - full
  - {policy: recency, budget: 10%}
  - lru
  - {policy: h2o, budget: 10%}
  - policy: lru
    label: lru pages
    granularity: 16
    budget: 25%
    scope: shared
    on_miss: fallback
    cadence: 64
  - oracle
  - belady
"""
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's results, with figures in the rows that only a later fmsim would write."""
    path = tmp_path_factory.mktemp("report")
    write(path / "small.safetensors", make_trace())
    (path / "small.yaml").write_text(SCENARIO)
    done = fmsim("run", "small.yaml", "--out", "out", folder=path)
    assert done.returncode == 0, done.stderr
    report = json.loads((path / "out/report.json").read_text())
    for row in report["policies"]:
        row["goodput_rps"] = 1.25
    (path / "out/report.json").write_text(json.dumps(report))
    return path


@pytest.fixture(scope="module")
def page(folder):
    done = fmsim("report", "out", "--perfetto", "out/timeline.json", folder=folder)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "out/report.html",
        "out/timeline.json",
    ]
    return folder / "out/report.html"


def test_the_page_holds_the_table_and_names_nothing_outside_itself(page):
    text = page.read_text()
    own = re.sub(
        r"<script>/\*.*?</script>", "", text, count=1, flags=re.DOTALL
    )  # less plotly itself
    assert len(own) < len(text) / 4
    assert "small &amp; &lt;made&gt;" in own and "goodput rps" in own and "1.25" in own
    for label in ("full", "recency", "lru", "h2o", "lru pages", "oracle", "belady"):
        assert re.search(rf"<tr><td>{label}</td><td class=\"(exact|lossy|bound)\">", own)
    assert not re.search(r"(src|href)=[\"'](?!#|data:)", own) and "://" not in own
    assert {
        event["ph"]
        for event in json.loads((page.parent / "timeline.json").read_text())["traceEvents"]
    } == {"M", "X", "C"}


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH (Debian's package chromium)"
)


def browse(page, folder):
    """(the page as drawn, its lines on the console, the URLs that it asked for) in headless
    Chromium.
    """
    quiet = [
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-quic",
    ]
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *quiet,
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1280,1000",
        "--enable-logging=stderr",
        f"--log-net-log={folder / 'net.json'}",
        "--virtual-time-budget=20000",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = [
        event.get("params", {}) for event in json.loads((folder / "net.json").read_text())["events"]
    ]
    asked = {
        event["url"]
        for event in events
        if event.get("initiator", "not an origin") != "not an origin"
    }  # that is the browser itself
    return done.stdout, console, {url for url in asked if not url.startswith(("file:", "data:"))}


@needs_browser
def test_a_browser_draws_every_figure_without_an_error_or_a_request(page, tmp_path):
    drawn, console, asked = browse(page, tmp_path)
    assert (console, asked) == ([], set())
    traces = {
        "trade-off": 7,
        "time": 2 * 7,
        "misses": 2 * 4 + 2,
        "lost-mass": 2 * 4,
        "granularity": 6,
        "regret": 2,
        "bound": 4,
    }
    assert list(traces) == [section.id for section in SECTIONS]
    for name, n in traces.items():
        [figure] = re.findall(rf'<section id="{name}">.*?</section>', drawn, flags=re.DOTALL)
        assert len(re.findall(r'class="(?:trace scatter \w+|trace bars|hm)"', figure)) == n, name
        assert len(re.findall(r'class="(?:js-line|point[ "]|hm)', figure)) >= n, (
            name
        )  # and something is drawn in them


@needs_browser
def test_the_browser_would_tell_an_error_and_a_request(tmp_path):
    (tmp_path / "page.html").write_text(
        '<img src="http://127.0.0.1:9/x.png"><script>console.error("wrong")</script>'
    )
    _, console, asked = browse(tmp_path / "page.html", tmp_path)
    assert any("wrong" in line for line in console) and asked == {"http://127.0.0.1:9/x.png"}


def test_a_page_without_the_trace_says_so_and_with_another_refuses(folder, tmp_path):
    shutil.copytree(folder / "out", tmp_path / "out")
    done = fmsim_here(
        "report", "out", "--out", "page.html", folder=tmp_path
    )  # from here the trace's relative path leads nowhere
    assert done.returncode == 0
    text = (tmp_path / "page.html").read_text()
    assert text.count('class="missing"') == 4 and "--trace FILE" in text
    assert (
        fmsim_here(
            "report",
            "out",
            "--out",
            "page.html",
            "--trace",
            folder / "small.safetensors",
            folder=tmp_path,
        ).returncode
        == 0
    )
    assert 'class="missing"' not in (tmp_path / "page.html").read_text()
    write(tmp_path / "other.safetensors", make_trace(seed=1))
    done = fmsim_here("report", "out", "--trace", "other.safetensors", folder=tmp_path)
    assert done.returncode == 2 and "not the trace of this run" in done.stderr


def test_a_users_mistake_is_told_in_one_line(folder, tmp_path):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/report.json").write_text('{"policies": [')
    shutil.copytree(folder / "out", tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/timelines")
    for arguments, says in (
        (["none"], "none: has no report.json; write it with `fmsim run"),
        (["cut"], "cut/report.json: not valid JSON"),
        (["bare"], "timelines/full.json: no such timeline file"),
        (
            [folder / "out", "--out", "/dev/null/x.html"],
            "--out /dev/null/x.html: cannot be written",
        ),
    ):
        done = fmsim_here("report", *arguments, folder=tmp_path)
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_without_plotly_the_fix_is_told(folder):
    hidden = "import sys; sys.modules['plotly'] = None; from fmsim.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hidden, "report", str(folder / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "pip install 'fmsim[report]'" in done.stderr


def test_a_report_of_another_schema_is_refused_by_name(tmp_path):
    old = {"scenario": {"details": {}}, "policies": []}
    (tmp_path / "report.json").write_text(json.dumps(old))
    with pytest.raises(FmsimError, match="report schema 1, but this fmsim reads 4"):
        Results.load(tmp_path)
