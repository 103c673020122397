"""Settings that must stand before torch and triton are imported, for this process and for the
commands that tests start.

Where there is no GPU, Triton kernels run in its interpreter; Triton asks when a kernel is defined.
One thread a process: tests run side by side (`pytest -n 2`), and threads that wait for each other
on busy cores take several times the processor time.
"""

import gc
import os
import tempfile

# What imports and collection make stays until the end: looked through once, then by no collection,
# here or in a forked process.
gc.disable()

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Which traces were found sound is remembered beside no user's own notes.
os.environ.setdefault("XDG_CACHE_HOME", tempfile.mkdtemp(prefix="fmsim-tests-"))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run what takes long on a CPU too")


def pytest_configure(config):
    """Workers take neighbours, which share fixtures, and at the end from each other."""
    if config.getoption("dist", "no") != "no":
        gc.enable()  # this process hands tests out, and collects none
    if config.getoption("dist", "no") == "load":
        config.option.dist = "worksteal"


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config, items):
    """A GPU is quick enough for all of them."""
    if config.getoption("--slow") or torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes long on a CPU: give --slow"))
