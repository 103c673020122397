"""`fmsim doctor`: what is missing is told with its fix."""

import json
import tomllib
from pathlib import Path

from command import fmsim_here

from fmsim.experiments import doctor

NEEDS = [
    "numpy>=2.0",
    'torch>=2.11; extra == "model"',
    'pandas>=2.2; extra == "pandas"',
    'pytest>=8; extra == "test"',
]


def test_each_task_runs_or_says_what_to_do(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: NEEDS)
    monkeypatch.setattr(doctor, "_version", {"pandas": "2.2"}.get)
    monkeypatch.setattr(doctor, "find_spec", lambda module: None)
    found = doctor.look()
    assert found["extras"] == {"model": {"torch": None}, "pandas": {"pandas": "2.2"}}
    tasks = {row["what"].partition(":")[0]: row for row in found["tasks"]}
    assert tasks["load_frame"]["runs"]
    calibrate = tasks["hw calibrate"]
    assert (calibrate["runs"], calibrate["fix"]) == (False, "pip install 'fmsim[model]'")
    assert "pip install 'fmsim[model]'" in found["why_no_gpu"]


def test_a_gpu_that_is_not_there_is_why_a_task_does_not_run(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: NEEDS)
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    monkeypatch.setattr(doctor, "_gpus", lambda: ([], "torch finds no CUDA device"))
    tasks = {row["what"]: row for row in doctor.look()["tasks"]}
    assert tasks["hw calibrate: measure this machine"]["fix"] == "torch finds no CUDA device"


def test_the_table_and_the_json_say_the_same():
    found = json.loads(fmsim_here("doctor", "--json").stdout)
    table = fmsim_here("doctor").stdout
    for task in found["tasks"]:
        assert f"{'yes' if task['runs'] else 'no '}  {task['what']}" in table


def test_every_task_names_an_extra_that_there_is():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert {task.extra for task in doctor.TASKS if task.extra} <= set(
        project["optional-dependencies"]
    )
