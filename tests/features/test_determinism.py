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


COMMANDS = [
    ["run", "small.yaml", "--json", "-q", "--out", "out/run"],
    ["run", "serving.yaml", "--json", "-q", "--out", "out/serve"],
    ["sweep", "small.yaml", "-g", "batch=1,2", "--json", "--out", "out/s.jsonl"],
]
CODE = f"""
from fmsim.cli import main
for command in {COMMANDS!r}:
    try:
        main(command)
    except SystemExit as end:
        assert not end.code, command
"""


def written(folder, world):
    """All that the commands printed and wrote to `out`, by name."""
    hash_seed, cores = world
    done = subprocess.run(
        [sys.executable, "-c", CODE],
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
def test_the_same_bytes_in_every_world(tmp_path):
    """Of a run, a served workload and a sweep."""
    found = []
    for number, world in enumerate(WORLDS):
        folder = tmp_path / str(number)
        (folder / "out").mkdir(parents=True)
        write(folder / "small.safetensors", make_trace(prompt_tokens=1024, n_steps=70))
        (folder / "small.yaml").write_text(SCENARIO)
        (folder / "serving.yaml").write_text(SCENARIO + SERVING)
        found.append(written(folder, world))
    assert {"run/report.json", "serve/report.json", "s.jsonl"} <= found[0].keys()
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, content in found[0].items():
            if name == "s.jsonl":  # rows stand in the order in which they ended
                assert sorted(other[name].splitlines()) == sorted(content.splitlines())
            else:
                assert other[name] == content, name
