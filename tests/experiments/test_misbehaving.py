"""Policies that misbehave are named, others' rows come out, and the exit code is 1."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from command import fmsim_here
from made_trace import make_trace

from fmsim.experiments.results.folder import writing
from fmsim.policies import registry
from fmsim.policies.base import Policy
from fmsim.trace import write

SCENARIO = "name: small\ntrace: small.safetensors\npolicies: [lru, {policy: bad}]\n"


class Newest(Policy):
    """Newest first: what the bad ones are made of."""

    name = "bad"
    action, evidence, decision_scope = "hierarchical", "position", "layer"

    def worth(self, step, pages):
        return self.ctx.xp.astype(pages, self.ctx.xp.float32)


class WritesHits(Newest):
    def observe(self, step, obs):
        obs.hit[:] = True


class WritesPages(Newest):
    def observe(self, step, obs):
        obs.pages[:] = 0


class Leaves(Newest):
    def observe(self, step, obs):
        sys.exit(0)


class LeavesAtOnce(Newest):
    def observe(self, step, obs):
        os._exit(0)


class IsKilled(Newest):
    def observe(self, step, obs):
        os.kill(os.getpid(), signal.SIGKILL)


class Sleeps(Newest):
    def observe(self, step, obs):
        time.sleep(10**6)


class FloorOfText(Newest):
    floor = "high"


class ManySlots(Newest):
    def n_slots(self, n_pages, **sizes):
        return 10**9


class NegativeSlots(Newest):
    def n_slots(self, n_pages, **sizes):
        return -1


class Prints(Newest):
    def observe(self, step, obs):
        os.write(1, b"hello\n")


class Nameless(Newest):
    name = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("misbehaving")
    write(folder / "small.safetensors", make_trace(prompt_tokens=256, n_steps=8, n_layers=1))
    (folder / "small.yaml").write_text(SCENARIO)
    return folder


@pytest.fixture
def install(monkeypatch):
    def under_name(policy):
        point = SimpleNamespace(name="bad", value="tests:Bad", load=lambda: policy)
        monkeypatch.setitem(registry._found(), "bad", point)
        registry._load.cache_clear()

    yield under_name
    registry._load.cache_clear()


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (WritesHits, "policy bad, step 0: observe raised ValueError: assignment destination"),
        (WritesPages, "policy bad, step 0: observe raised ValueError: assignment destination"),
        (Leaves, "policy bad, step 0: observe called sys.exit(0)"),
        (LeavesAtOnce, "policy bad: its process left with exit code 0 and no result"),
        (IsKilled, "policy bad: its process was killed by SIGKILL"),
        (Sleeps, "policy bad: it took longer than its time limit (--policy-timeout)"),
        (FloorOfText, "policy bad: floor is 'high'; it must be a number or None"),
        (ManySlots, "policy bad: n_slots returned 1000000000; it must be from 1 to 66"),
        (NegativeSlots, "policy bad: n_slots returned -1; it must be from 1 to 66"),
    ],
)
def test_a_bad_policy_is_named_and_the_others_come_out(folder, install, policy, says):
    install(policy)
    limit_s = 6 if policy is Sleeps else 600  # lru must end within it, on a busy machine too
    done = fmsim_here("run", "small.yaml", "--json", "--policy-timeout", limit_s, folder=folder)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert [row["policy"] for row in report["policies"]] == ["lru"]
    [failed] = report["failed"]
    assert failed["policy"] == "bad" and failed["error"].startswith(says)
    assert done.stderr == f"fmsim: {failed['error']}\n"


PLUG_INS = """\
import os, pathlib, time
from fmsim.policies.lru import LRU

class LeavesAtOnce(LRU):
    name = "leaves"
    def observe(self, step, obs):
        os._exit(0)

class LeavesInTorch(LRU):
    name = "leaves-in-torch"
    def observe(self, step, obs):
        if type(obs.pages).__module__.startswith("torch"):
            os._exit(3)
        super().observe(step, obs)

class Sleeps(LRU):
    name = "sleeps"
    def observe(self, step, obs):
        pathlib.Path("asleep").touch()
        time.sleep(10**6)
"""
SHORT = ("--prompt-file", "text.txt", "--context", 64, "--steps", 2)  # of exec
LEFT = "its process left with exit code 0 and no result"
LATE = "it took longer than its time limit (--policy-timeout)"


@pytest.fixture(scope="module")
def plug_ins(folder):
    (folder / "plug_ins.py").write_text(PLUG_INS)
    (folder / "text.txt").write_text("The river ran past an old mill. " * 20)
    return "plug_ins.py"


def test_a_sweep_of_one_process_names_them_too(folder, plug_ins):
    policies = ["-p", f"{plug_ins}:LeavesAtOnce", "-p", f"{plug_ins}:Sleeps", "-p", "lru"]
    options = ["-g", "batch=1", "-j", 1, "--policy-timeout", 6, "--json"]
    done = fmsim_here("sweep", "small.yaml", *options, *policies, folder=folder)
    rows = {row["policy"]: row for row in json.loads(done.stdout)}
    for label, says in (("leaves", LEFT), ("sleeps", LATE)):
        assert rows[label]["error"] == f"policy {label}: {says}" and rows[label]["failed"]
    assert rows["lru"]["mass_kept"] == 1.0 and "failed" not in rows["lru"]
    assert done.returncode == 1


def test_validate_names_them_and_checks_the_others(folder, plug_ins):
    """One leaves in the replay, one in the engine."""
    policies = ["-p", f"{plug_ins}:LeavesAtOnce", "-p", f"{plug_ins}:LeavesInTorch", "-p", "lru"]
    command = ("validate", "small.yaml", "--json", "-q", "--device", "cpu")
    done = fmsim_here(*command, *policies, folder=folder)
    report = json.loads(done.stdout)
    assert [(row["policy"], row["identical"]) for row in report["policies"]] == [("lru", True)]
    said = {
        "leaves": f"policy leaves: {LEFT}",
        "leaves-in-torch": f"policy leaves-in-torch: {LEFT.replace('code 0', 'code 3')}",
    }
    assert {row["policy"]: row["error"] for row in report["failed"]} == said
    assert done.returncode == 1
    assert all(f"fmsim: {error}\n" in done.stderr for error in said.values())


@pytest.mark.slow  # the next one crosses the same edges
def test_exec_names_one_that_leaves(folder, plug_ins):
    options = [*SHORT, "--device", "cpu", "--json"]
    done = fmsim_here("exec", "-p", f"{plug_ins}:LeavesAtOnce", *options, folder=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(f"fmsim: policy leaves: {LEFT}\n")


def test_exec_names_one_that_sleeps_and_counts_no_start(folder, plug_ins):
    """A second is less than a worker, which loads torch and a model, takes to start."""
    options = [*SHORT, "--device", "cpu", "--json"]
    (folder / "asleep").unlink(missing_ok=True)
    limit = ["--policy-timeout", 1]
    done = fmsim_here("exec", "-p", f"{plug_ins}:Sleeps", *options, *limit, folder=folder)
    assert (folder / "asleep").exists()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(f"fmsim: policy sleeps: {LATE}\n")


def test_two_runs_into_one_folder_are_not_mixed(folder):
    with writing(folder / "one-out"):
        done = fmsim_here("run", "small.yaml", "-p", "lru", "--out", "one-out", folder=folder)
        assert done.returncode == 2 and "another run writes this folder; wait" in done.stderr
        assert os.listdir(folder / "one-out") == [".report.json.lock"]
    assert not (folder / "one-out").exists()
    done = fmsim_here("run", "small.yaml", "-p", "lru", "--out", "one-out", folder=folder)
    assert done.returncode == 0 and (folder / "one-out" / "report.json").exists()


def test_what_a_policy_prints_leaves_the_json_whole(folder, install, capfd):
    install(Prints)
    done = fmsim_here("run", "small.yaml", "--json", folder=folder)
    assert done.returncode == 0 and len(json.loads(done.stdout)["policies"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("hello\n") == 8


def test_a_policy_without_a_name_is_left_out_by_name_of_its_entry_point(folder, install):
    install(Nameless)
    done = fmsim_here("run", "small.yaml", folder=folder)
    left_out, wrong = done.stderr.splitlines()
    assert left_out.startswith("fmsim: policy 'bad' (") and "it has no `name`" in left_out
    assert done.returncode == 2 and "no policy named 'bad'" in wrong


def test_no_worker_outlives_a_killed_command(folder):
    """kill -9 strikes while both workers sleep in a policy."""
    code = (
        "import sys, time; from types import SimpleNamespace\n"
        "from fmsim.policies import registry\n"
        "from fmsim.policies.lru import LRU\n"
        "class Sleeps(LRU):\n"
        "    def observe(self, step, obs):\n"
        "        print('asleep', flush=True); time.sleep(1000)\n"
        "point = SimpleNamespace(name='lru', value='x', load=lambda: Sleeps)\n"
        "registry._found()['lru'] = point\n"
        "from fmsim.cli import main; main()\n"
    )
    command = [sys.executable, "-c", code, "run", "small.yaml", "-p", "lru"]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout.readline() == b"asleep\n"
        process.send_signal(signal.SIGKILL)
        # the pipe ends when the last process that inherited it has ended
        assert process.stdout.read() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_one_line_and_exit_code_130(folder, number):
    code = (
        "import time\n"
        "from fmsim.experiments import run\n"
        "def slow(*_): print('waiting', flush=True); time.sleep(1000)\n"
        "run.Setting = slow\n"
        "from fmsim.cli import main; main()\n"
    )
    command = [sys.executable, "-c", code, "run", "small.yaml", "-p", "lru"]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "fmsim: interrupted\n")


def test_a_bug_says_so_with_exit_code_70(folder, monkeypatch):
    elsewhere = folder / "fmsim" / "mine.py"  # below a folder of that name, and no part of fmsim
    fails = eval(compile("lambda file: 1 / 0", str(elsewhere), "eval"))
    monkeypatch.setattr("fmsim.experiments.run.load_geometry", fails)
    done = fmsim_here("run", "small.yaml", "-p", "lru", folder=folder)
    assert done.returncode == 70 and "Traceback" not in done.stderr
    assert done.stderr.startswith("fmsim: a bug in fmsim at run.py:")
    assert "ZeroDivisionError" in done.stderr and "report it" in done.stderr
    debug = fmsim_here("--debug", "run", "small.yaml", "-p", "lru", folder=folder)
    assert debug.returncode == 70 and "Traceback" in debug.stderr
