"""benchmarks/answers.py: every table of README and docs is what its result file renders to, and a
wrong cell or a figure that moved is named.
"""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
from hand_kernels import kernel_table

from fmsim.errors import FmsimError
from fmsim.hw.calibration import Calibration, write_preset

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import answers
import headline
import regions

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
    ROOT / "fmsim" / "nano" / "model" / "README.md",
]
SHOWN = {(page, part) for answer in answers.ANSWERS.values() for page, part in answer.parts}


@pytest.mark.parametrize("name", answers.ANSWERS)
def test_every_table_shows_its_file(name):
    assert not list(answers.disagreements(answers.ANSWERS[name], answers.read_page))


def test_every_marked_part_of_a_page_belongs_to_an_answer():
    marked = {
        (str(page.relative_to(ROOT)), found["name"])
        for page in PAGES
        for found in regions.BEGIN.finditer(page.read_text(encoding="utf-8"))
        if found["script"].startswith("benchmarks/")
    }
    assert marked == SHOWN


def test_every_result_file_that_an_answer_has_is_there_with_its_command():
    for name, answer in answers.ANSWERS.items():
        found = answer.stored()
        assert found is not None, name
        if found.get("rows") == []:
            continue  # not measured yet, and its pages say so
        logged = answer.path.suffix == ".jsonl"
        told = set(found["rows"][0]) if logged else set(found) | set(found.get("about", ()))
        assert {"command", "commands"} & told, name


FIGURES = re.compile(r"\|\s*[+-]?\d[\d.,]*\s*(%|x|us|ms|MiB)?\s*(?=\|)")
BY_HAND = {  # nothing measured
    ("docs/reference/errors.md", "| Exit code | Meaning |"),
    ("docs/reference/errors.md", "| What | Bound | Lifted by |"),
}


def test_no_table_of_figures_is_written_by_hand():
    found = set()
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        made = {
            number
            for part in regions.find("\n".join(lines))
            for number in _lines_of(page.read_text(encoding="utf-8"), part)
        }
        for number, line in enumerate(lines):
            if line.startswith("|---") and number not in made:
                rows = itertools.takewhile(lambda row: row.startswith("|"), lines[number + 1 :])
                if any(FIGURES.search(row) for row in rows):
                    found.add((str(page.relative_to(ROOT)), lines[number - 1]))
    assert found - BY_HAND == set()


def _lines_of(page, part):
    first = regions.line_of(page, part) - 1
    return range(first, first + len(regions.find(page)[part].splitlines()))


def test_a_wrong_cell_is_named_with_line_table_and_column():
    answer = answers.ANSWERS["steps"]
    page = answers.read_page("benchmarks/results/published.md")
    row = next(line for line in page.splitlines() if line.startswith("| glm-5.2, h200"))
    number = page.splitlines().index(row) + 1
    wrong = row.replace("| +38% |", "| +3% |").replace("| -12% |", "| -2% |")
    assert wrong != row
    found = list(answers.disagreements(answer, lambda name: page.replace(row, wrong)))
    assert len(found) == 1
    assert found[0].startswith(
        f"benchmarks/results/published.md, line {number}, table 'step times', cell"
    )
    assert "'error': has '-2%', should be '-12%'" in found[0]


def test_a_sentence_whose_figure_moved_is_named():
    answer = answers.ANSWERS["serve"]
    page = answers.read_page("benchmarks/results/published.md")
    assert page.count("CPU seconds") == 1
    moved = page.replace("CPU seconds", "hours")
    found = list(answers.disagreements(answer, lambda name: moved))
    assert found and all("'how fast'" in line for line in found)


def test_times_of_another_machine_are_no_disagreement_and_are_not_written(tmp_path):
    answer = answers.ANSWERS["serve"]
    stored = answer.stored()
    other = answer.stored()
    other["runs"]["lru"]["cpu_s"] += 1
    assert not list(answers.disagreements(answer, answers.read_page, other))
    assert answers.settled(stored, other) is stored
    other["runs"]["lru"]["tokens"] += 1000
    assert answers.settled(stored, other)["runs"]["lru"] == other["runs"]["lru"]
    assert list(answers.disagreements(answer, answers.read_page, other))


def test_every_list_of_sentences_is_of_a_file_that_an_answer_has():
    assert set(answers.claims.PARTS) <= {answer.file for answer in answers.ANSWERS.values()}


def test_a_line_too_few_and_a_missing_part_are_named():
    answer = answers.ANSWERS["steps"]
    page = answers.read_page("benchmarks/results/published.md")
    row = next(line for line in page.splitlines() if line.startswith("| v4-flash, h20 "))
    found = list(answers.disagreements(answer, lambda name: page.replace(f"{row}\n", "")))
    assert len(found) == 1 and "has None" in found[0]
    gone = page.replace("<!-- made: step times", "<!-- step times")
    assert "benchmarks/results/published.md" in next(
        answers.disagreements(answer, lambda name: gone)
    )


def test_a_figure_that_moved_is_named_and_rounding_dates_and_times_are_not():
    old = {"date": 1, "wall_s": 2.0, "rows": [{"held": 3, "rate": 1.0}], "why": "a"}
    new = {"date": 2, "wall_s": 9.0, "rows": [{"held": 4, "rate": 1.0 + 1e-9}], "why": "b"}
    found = [(path, a, b) for path, a, b in answers.compare(old, new)]
    assert found == [(("rows", 0, "held"), 3, 4), (("why",), "a", "b")]
    assert list(answers.compare({"a": [1]}, {"a": [1, 2]})) == [(("a",), [1], [1, 2])]
    assert list(answers.compare({"a": None}, {"a": 0.0})) == [(("a",), None, 0.0)]


def test_a_figure_computed_anew_is_compared_with_the_file_and_with_the_page():
    answer = answers.ANSWERS["steps"]
    computed = {"published": json.loads(json.dumps(answer.stored()["published"]))}
    assert not list(answers.disagreements(answer, answers.read_page, computed))
    computed["published"][0]["modelled_tpot_ms"] += 1
    found = list(answers.disagreements(answer, answers.read_page, computed))
    assert [line.split(":")[0] for line in found][:1] == ["benchmarks/results/steps.json"]
    assert (
        "published.0.modelled_tpot_ms" in found[0] and "benchmarks/results/published.md" in found[1]
    )


def test_a_page_says_by_whom_each_of_its_parts_is_made():
    for page in PAGES:
        for found in regions.BEGIN.finditer(page.read_text(encoding="utf-8")):
            assert (ROOT / found["script"]).is_file(), f"{page.name}: {found['script']}"


def test_parts_are_found_replaced_and_counted():
    page = f"# A\n\n{regions.marked('x', 'a.py')}\n{regions.marked('y', 'b.py')}"
    page = regions.replace(page, "y", "| b |")
    assert regions.find(page) == {"x": "", "y": "| b |"}
    assert page.splitlines()[regions.line_of(page, "y") - 1] == "| b |"
    with pytest.raises(ValueError, match="no part"):
        regions.replace(page, "z", "")
    with pytest.raises(ValueError, match="two parts"):
        regions.find(page + page)
    with pytest.raises(ValueError, match="has no line"):
        regions.find(re.sub("<!-- end of y -->", "", page))


ROW = {
    "context": "512K",
    "policy": "full",
    "budget": None,
    "tokens": 512_520,
    "steps": 520,
    "predicted_gpu_bytes": 2**30,
    "built_gpu_bytes": 2**30,
    "allocator_gpu_bytes": 2**30 + 2**20,
    "memory_error": 1 / 1024,
    "simulated_step_p50_s": 0.0099,
    "measured_step_p50_s": 0.01,
    "step_error": -0.01,
    "simulated_tokens_per_s": 101.0,
    "measured_tokens_per_s": 100.0,
    "tokens_error": 0.01,
}


def test_the_headline_table_shows_predicted_beside_measured():
    rows = [
        ROW,
        ROW | {"policy": "lsa", "budget": "25% gpu"},
        ROW | {"context": "32K", "policy": "h2o", "budget": "12.5% gpu"},
        {"context": "32K", "policy": "lsa", "failed": "no room"},
    ]
    made = headline.tables({"rows": rows})
    assert made["headline"].splitlines()[2] == (
        "| full |  | 1,024.0 | 1,025.0 | +0.10% | 9.90 | 10.00 | -1% | 101.0 | 100.0 | +1% |"
    )
    assert "| lsa |" not in made["headline"] and "| lsa |" in made["headline by context"]
    assert "32K: `lsa`: no room" in made["headline by context"]
    assert made["headline by context"].index("32K (") < made["headline by context"].index("512K (")


MEASURED = {
    "device": "Some GPU",
    "software": "torch",
    "date": "2026-01-01",
    "weights": "bf16 weights",
    "hbm_bytes": 80e9,
    "reserve_bytes": 1e9,
    "host_bytes": 128e9,
    "copy_bytes_per_s": 3e12,
    "matmul_flops": 7e14,
    "link_bytes_per_s": 55e9,
    "graph_launch_s": 1e-6,
    "host_launch_s": 5e-6,
    "gathers": {584: {4096: 26e9, 32_768: 42e9}},
}


class _Bench:
    model, device, memory_only = "m", "cpu", False

    def row(self, context, label):
        return {"context": context, "policy": label, "measured_step_p50_s": 1.0, "wall_s": 100.0}


def test_rows_are_written_as_they_come_and_none_is_begun_too_late(tmp_path):
    pytest.importorskip("torch", reason="names the device's software")
    out = tmp_path / "part.json"
    rows = headline.measure(["32K", "128K"], ["full", "h2o"], _Bench(), 99.0, out, "c")
    assert [row["policy"] for row in rows] == ["full"]
    assert json.loads(out.read_text())["rows"] == rows


HEAD = {"date": "d", "command": "c", "device": "g", "software": "s", "model": headline.MODEL}
BYTES = {
    "tokens": 512_512,
    "steps": 512,
    "trace_sha256": "ab",
    "full_gpu_bytes": 2**31,
    "memory_holds": True,
    "memory_error": 0.001,
    "predicted_gpu_bytes": 1000,
    "built_gpu_bytes": 1001,
    "allocator_gpu_bytes": 1001,
    "page_bytes": 9,
    "spare_bytes": 8,
}


def test_bytes_measured_again_leave_the_times_as_they_are(tmp_path):
    part = tmp_path / "part.json"
    told = HEAD | {"memory_only": True}
    rows = [{"context": "512K", "policy": "full", "budget": None} | BYTES]
    part.write_text(json.dumps(told | {"rows": rows}))
    gone = ROW | {"policy": "native"}
    result = headline.join_memory({"device": "h", "rows": [ROW, gone]}, [part])
    [row] = result["rows"]
    assert row["measured_step_p50_s"] == ROW["measured_step_p50_s"] and row["steps"] == 520
    assert (row["allocator_gpu_bytes"], row["memory_steps"]) == (1001, 512)
    assert result["device"] == "h" and result["memory"]["device"] == "g"
    assert result["memory"]["trace_sha256"] == {"512K": "ab"}
    other = ROW | {"policy": "h2o"}
    with pytest.raises(FmsimError, match="no part has the bytes of 512K h2o"):
        headline.join_memory({"rows": [ROW, other]}, [part])
    with pytest.raises(FmsimError, match="has now None and was timed with 25% gpu"):
        headline.join_memory({"rows": [ROW | {"budget": "25% gpu"}]}, [part])


def test_the_bytes_of_a_row_are_those_that_the_whole_check_finds():
    pytest.importorskip("torch", reason="builds the engine's tensors")
    quick = headline.Bench(headline.MODEL, "cpu", memory_only=True).row("32K", "h2o")
    stored = answers.ANSWERS["headline"].stored()
    row = next(r for r in stored["rows"] if (r["context"], r["policy"]) == ("32K", "h2o"))
    assert quick["budget"] == row["budget"] and quick["memory_holds"]
    assert quick["built_gpu_bytes"] / quick["full_gpu_bytes"] == pytest.approx(
        row["built_gpu_bytes"] / row["full_gpu_bytes"], rel=0.01
    )
    assert "measured_step_p50_s" not in quick


def test_parts_are_joined_with_what_their_preset_predicts(tmp_path):
    kernels = {"one-gpu": kernel_table()}
    calibration = Calibration.model_validate(MEASURED | {"kernels": kernels})
    preset, *_ = write_preset(calibration, tmp_path / "mine.yaml")
    measured = {
        "context": "32K",
        "policy": "h2o",
        "budget": "12.5% gpu",
        "steps": 12,
        "warm_up_steps": 4,
        "measured_step_p50_s": 0.01,
        "measured_tokens_per_s": 100.0,
    }
    head = HEAD | {"memory_only": False}
    failed = {"context": "32K", "policy": "lsa", "failed": "no room"}
    for name, rows in (("a", [failed]), ("b", [measured])):
        (tmp_path / f"{name}.json").write_text(json.dumps(head | {"rows": rows}))
    parts = [tmp_path / "a.json", tmp_path / "b.json"]
    result = headline.join(parts, preset)
    row, left = result["rows"]
    assert left == failed and result["preset"]["title"] == "Some GPU"
    assert row["step_error"] == pytest.approx(row["simulated_step_p50_s"] / 0.01 - 1)
    assert row["tokens_error"] == pytest.approx(row["simulated_tokens_per_s"] / 100 - 1)
    (tmp_path / "b.json").write_text(json.dumps(head | {"device": "other", "rows": []}))
    with pytest.raises(FmsimError, match="differ in their device: g, other"):
        headline.join(parts, preset)


@pytest.mark.parametrize("name", ["TERM=dumb", "NO_COLOR=1", "COLUMNS=50"])
def test_a_picture_does_not_depend_on_the_terminal_at_hand(name, monkeypatch):
    monkeypatch.setenv(*name.split("="))
    assert not list(answers.disagreements(answers.ANSWERS["500k"], answers.read_page))
