"""The table of a run: rows by budget, the best figures, and policies that could not run."""

from rich.console import Console

from fmsim.report.grid import ALL
from fmsim.report.tables import decode as table


def row(label, gpu_bytes, mass_kept, requests, tokens_per_s):
    return {
        "policy": label,
        "gpu_bytes": gpu_bytes,
        "gpu_ratio": gpu_bytes / 2**30,
        "kv_hbm_ratio": 0.1,
        "entry_recall": mass_kept,
        "entry_recall_per_step": mass_kept,
        "mass_kept": mass_kept,
        "set_overlap": None,
        "decode_tokens_per_s": 100.0,
        "step_s": {"p50": 0.01, "p99": 0.01},
        "h2d_bytes_per_step": 0.0,
        "stall_ratio": 0.0,
        "max_requests": requests,
        "at_max_requests": {"decode_tokens_per_s": tokens_per_s, "stall_ratio": 0.0},
    }


def report():
    runs = {
        "full": ("full", "all", "position"),
        "lru 25% gpu": ("lru", "25% gpu", "attention_history"),
        "lsa 25% gpu": ("lsa", "25% gpu", "predicted_future"),
        "oracle 25% gpu": ("oracle", "25% gpu", "future"),
        "lru 50% gpu": ("lru", "50% gpu", "attention_history"),
        "lsa 50% gpu": ("lsa", "50% gpu", "predicted_future"),
    }
    rows = [
        row("full", 2**30, 1.0, 10, 500.0),
        row("lsa 25% gpu", 2**28, 0.5, 40, 2000.0),
        row("oracle 25% gpu", 2**28, 0.9, 40, 2500.0),
        row("lru 50% gpu", 2**29, 1.0, 20, 800.4),
        row("lsa 50% gpu", 2**29, 0.75, 20, 1000.0),
    ]
    failed = {
        "policy": "lru 25% gpu",
        "error": "lru 25% gpu: policy lru: budget 25% gpu is 0.250 GiB, and index keys alone take"
        " 0.375 GiB",
        "least_gpu_bytes": 3 * 2**27,
    }
    about = {
        "trace": {"masses": True},
        "budgets": {"25% gpu": 2**28, "50% gpu": 2**29},
        "runs": {
            label: {"entry": entry, "budget": budget, "evidence": evidence}
            for label, (entry, budget, evidence) in runs.items()
        },
        "details": {
            one["policy"]: {"exact": one["mass_kept"] == 1.0, "max_requests_bound": "GPU memory"}
            for one in rows
        },
    }
    return {"scenario": about, "policies": rows, "failed": [failed]}


def test_rows_stand_by_budget_and_who_cannot_be_is_a_row():
    found = [
        (heading, [one["policy"] for one in rows], [one["policy"] for one in failed])
        for heading, rows, failed in table.groups(report())
    ]
    assert found == [
        ("", ["full"], []),
        ("at 25% gpu, 0.250 GiB", ["lsa 25% gpu", "oracle 25% gpu"], ["lru 25% gpu"]),
        ("at 50% gpu, 0.500 GiB", ["lru 50% gpu", "lsa 50% gpu"], []),
    ]
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table._grid(report()).table(ALL))
    lines = console.export_text().splitlines()
    [short] = [line for line in lines if ">= 0.375" in line]
    assert short.startswith("│lru") and "none" in short
    [why] = table._reasons(report()["failed"], report()["scenario"])
    assert why == "none: lru: index keys alone take 0.375 GiB"


def test_the_best_of_a_budget_stands_out_bounds_and_full_aside():
    made = report()
    headings = [column.heading for column in table.COLUMNS]
    then, mass = headings.index("tokens/s*\nthen"), headings.index("mass\nkept")
    (_, alone, _), (_, few, _), (_, many, _) = table.groups(made)
    assert not any(table.bests(alone, made["scenario"]))
    assert not any(table.bests(few, made["scenario"]))  # one policy that could be deployed
    best = table.bests(many, made["scenario"])
    assert best[then] == {"lsa 50% gpu"} and best[mass] == {"lru 50% gpu"}
    assert best[headings.index("requests\nfit*")] == set()  # both alike
    assert best[headings.index("on GPU\nGiB")] == set()  # neither better nor worse


def test_the_title_says_what_was_changed_and_nothing_of_a_trace_that_is_not_there():
    about = {"name": "32k", "description": "", "set": ["trace=other", "batch=2"]}
    assert str(table.title(about)) == "32k  with trace=other, batch=2"
    assert str(table.title({"name": "32k", "description": "needles"})) == "32k  needles"
