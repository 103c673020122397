"""The same seed gives the same bytes, however Python hashes and however many cores there are."""

import os
import subprocess
import sys

import pytest
from made_trace import make_trace

from fmsim.trace import write

SCENARIO = """\
name: small
trace: small.safetensors
policies:
  - lru
  - random
  - {policy: h2o, budget: 20%}
  - {policy: s3fifo, budget: 20%, granularity: 4}
"""
SERVING = """\
workload: {kind: poisson, rate_per_s: 20, prompt_tokens: [500, 4000], output_tokens: 8,
  duration_s: 2}
"""
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
WORLDS = [("0", CORES[:1]), ("4242", CORES)]


def written(folder, world, *arguments):
    """All that a command printed and wrote to `out`, by name."""
    hash_seed, cores = world
    command = [sys.executable, "-c", "from fmsim.cli import main; main()", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        cwd=folder,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    assert done.returncode == 0, done.stderr.decode()
    out = folder / "out"
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.*")}
    return {"printed": done.stdout} | files


@pytest.mark.skipif(not CORES, reason="cores cannot be chosen here")
@pytest.mark.parametrize(
    ("text", "command"),
    [
        (SCENARIO, ["run", "small.yaml", "--json", "-q", "--out", "out"]),
        (SCENARIO + SERVING, ["run", "small.yaml", "--json", "-q", "--out", "out"]),
        (SCENARIO, ["sweep", "small.yaml", "-g", "batch=1,2", "--json", "--out", "out/s.jsonl"]),
    ],
    ids=["run", "serve", "sweep"],
)
def test_the_same_bytes_in_every_world(tmp_path, text, command):
    found = []
    for number, world in enumerate(WORLDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder / "small.safetensors", make_trace(prompt_tokens=1024, n_steps=70))
        (folder / "small.yaml").write_text(text)
        found.append(written(folder, world, *command))
    assert len(found[0]) >= 2
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, content in found[0].items():
            if name == "s.jsonl":  # rows stand in the order in which they ended
                assert sorted(other[name].splitlines()) == sorted(content.splitlines())
            else:
                assert other[name] == content, name
