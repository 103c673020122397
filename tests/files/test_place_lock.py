"""Two commands never write one place at once, with the kernel's locks and without."""

import os
import signal
import subprocess
import sys

import pytest

from fmsim.files import place_lock as module
from fmsim.files.place_lock import Taken, place_lock

HOLD = (
    "import pathlib, sys, time\n"
    "{hide}"
    "from fmsim.files.place_lock import place_lock\n"
    "with place_lock(pathlib.Path('out')):\n"
    "    print('held', flush=True); time.sleep(1000)\n"
)
HIDE = "sys.modules['fcntl'] = None\n"


def holder(folder, hide=""):
    command = [sys.executable, "-c", HOLD.format(hide=hide)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_held_place_is_refused_until_its_holder_is_killed(tmp_path):
    with holder(tmp_path) as process:
        with (
            pytest.raises(Taken, match="wait for it, or give another"),
            place_lock(tmp_path / "out"),
        ):
            pass
        process.send_signal(signal.SIGKILL)
    with place_lock(tmp_path / "out"):
        assert os.listdir(tmp_path) == [".out.lock"]
    assert os.listdir(tmp_path) == []


def test_without_fcntl_the_file_itself_is_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    with (
        place_lock(tmp_path / "out"),
        pytest.raises(Taken, match=r"delete .*\.out\.lock if none runs"),
        place_lock(tmp_path / "out"),
    ):
        pass
    assert os.listdir(tmp_path) == []
    with holder(tmp_path, HIDE) as process:
        with pytest.raises(Taken), place_lock(tmp_path / "out"):
            pass
        process.kill()


def test_nothing_needs_fcntl_to_be_imported():
    modules = "fmsim.experiments.results.rows, fmsim.exec.kv.mirror, fmsim.cli"
    code = f"import sys\n{HIDE}import {modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
