"""`fmsim report`: the page in a real browser, what stands in it, and what is told when something is
missing.
"""

import json
import os
import re
import shutil
import stat
from xml.etree import ElementTree

import pytest
from browser import browse, check, measured, meets, needs_browser
from command import fmsim, fmsim_here
from made_trace import make_trace

from fmsim.errors import FmsimError
from fmsim.experiments.results.folder import Results
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's results, with figures in the rows that only a later fmsim would write."""
    path = tmp_path_factory.mktemp("report")
    write(path / "small.safetensors", make_trace())
    (path / "small.yaml").write_text(SCENARIO)
    done = fmsim_here("run", "small.yaml", "--out", "out", folder=path)
    assert done.returncode == 0, done.stderr
    report = json.loads((path / "out/report.json").read_text())
    for row in report["policies"]:
        row["goodput_rps"] = 1.25
    (path / "out/report.json").write_text(json.dumps(report))
    return path


@pytest.fixture(scope="module")
def page(folder):
    further = ("--perfetto", "out/timeline.json", "--figures", "out/charts")
    done = fmsim("report", "out", *further, folder=folder)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "out/report.html",
        "out/charts",
        "out/timeline.json",
    ]
    return folder / "out/report.html"


def test_the_page_holds_question_answer_chart_and_table_and_names_nothing_outside_itself(page):
    text = page.read_text()
    assert len(text) < 1_500_000
    assert "small &amp; &lt;made&gt;" in text and "goodput rps" in text and "1.25" in text
    for label in ("full", "recency", "lru", "h2o", "lru pages", "oracle", "belady"):
        row = rf'<tr><th scope="row">{label}</th><td class="(exact|lossy|bound)">'
        assert re.search(row, text), label
    for part in ("<h1>", 'class="answer"', 'id="chart-quality"', 'id="table"'):
        assert text.count(part) == 1
    places = [text.index(part) for part in ("<h1>", 'class="answer"', "chart-quality", "<table>")]
    assert places == sorted(places)
    assert re.search(r"keeps [\d.]+( ± [\d.]+)?% of the attention mass", text)
    assert not re.search(r"(src|href)=[\"'](?!#|data:)", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert {
        event["ph"]
        for event in json.loads((page.parent / "timeline.json").read_text())["traceEvents"]
    } == {"M", "X", "C"}


def test_every_chart_is_a_file_too_and_all_may_read_them(page):
    names = re.findall(r'data-name="([\w-]+)"', page.read_text())
    files = {path.stem: path for path in (page.parent / "charts").iterdir()}
    assert set(files) == set(names) and len(names) == len(set(names)) == 11
    for path in (*files.values(), page):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()
    for path in files.values():
        ElementTree.fromstring(path.read_text())


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_the_charts_show_is_there_for_a_screen_reader(page):
    text = page.read_text()
    for section in re.findall(r'<section id="(?!table).*?</section>', text, flags=re.DOTALL):
        [title] = re.findall(r"<h2>(.*?)</h2>", section)
        charts = re.findall(r'<svg class="chart".*?</svg>', section, flags=re.DOTALL)
        assert len(charts) >= 2, title  # for a screen and for a phone
        for chart in charts:
            assert re.search(r'role="group" aria-label="[^"]+: [^"]+"', chart)
            assert re.search(r'tabindex="0" role="img" aria-label="[^"]+"', chart)
    assert re.search(r'aria-label="lru: attention mass kept 100.0% with [\d.]+ GiB', text)


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1400, 800, 420])
def test_a_browser_draws_it_without_an_error_a_request_or_an_overlap(page, tmp_path, width, dark):
    found = measured(page, tmp_path, width, dark)
    check(found, width, dark)
    names = re.findall(r'data-name="([\w-]+)"', page.read_text())
    assert [chart["name"] for chart in found["charts"]] == names
    marks = {chart["name"]: chart["marks"] for chart in found["charts"]}
    assert marks["quality"] == 7 and marks["kept"] == 7 and marks["fits"] == 7
    assert all(marks.values())


@needs_browser
def test_the_browser_would_tell_an_error_and_a_request(tmp_path):
    (tmp_path / "page.html").write_text(
        '<img src="http://127.0.0.1:9/x.png"><script>console.error("wrong")</script>'
    )
    _, console, asked = browse(tmp_path / "page.html", tmp_path)
    assert any("wrong" in line for line in console) and asked == {"http://127.0.0.1:9/x.png"}


def test_the_probe_would_tell_an_overlap():
    one = {"left": 0, "right": 50, "top": 0, "bottom": 14}
    assert meets(one, one | {"left": 40, "right": 90}) and not meets(one, one | {"left": 51})
    assert not meets(one, one | {"top": 14, "bottom": 28})


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


def test_a_report_of_another_schema_is_refused_by_name(tmp_path):
    old = {"scenario": {"details": {}}, "policies": []}
    (tmp_path / "report.json").write_text(json.dumps(old))
    with pytest.raises(FmsimError, match="report schema 1, but this fmsim reads 4"):
        Results.load(tmp_path)
