"""Version 3: packed rows, keys of some layers, and what traces of one prompt share."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fmsim import trace as traces
from fmsim.errors import FmsimError
from fmsim.indexer.labels import LabelRule
from fmsim.indexer.windows import read_windows
from fmsim.replay.replayer import Replayer
from fmsim.testing.sample import sample_trace
from fmsim.trace import float8
from fmsim.trace.cut import cut
from fmsim.trace.packed import CHUNK_STEPS, rounded
from fmsim.trace.summary import summary


def rows_of(seed, steps, layers, width, entries, churn):
    """Ascending rows that change by a share of their ids from step to step; some end early."""
    rng = np.random.default_rng(seed)
    ids = np.full((steps, layers, width), -1, np.int32)
    for layer in range(layers):
        row = np.unique(rng.integers(entries, size=width))
        for step in range(steps):
            kept = row[rng.random(len(row)) >= churn]
            row = np.union1d(kept, rng.integers(entries, size=width))
            row = rng.permutation(row)[: rng.integers(0, width + 1)]
            ids[step, layer, : len(row)] = np.sort(row)
    return ids


def packed(trace):
    return trace.with_header(format_version=3)


@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    seed=st.integers(0, 99),
    steps=st.sampled_from((1, 3, CHUNK_STEPS, CHUNK_STEPS + 1, 2 * CHUNK_STEPS + 7)),
    layers=st.integers(1, 3),
    width=st.integers(1, 9),
    entries=st.sampled_from((1, 9, 300, 70_000, 300_000)),
    churn=st.sampled_from((0.0, 0.2, 1.0)),
)
def test_any_rows_and_masses_come_back(
    tmp_path_factory, seed, steps, layers, width, entries, churn
):
    path = tmp_path_factory.mktemp("trace") / "a.safetensors"
    ids = rows_of(seed, steps, layers, width, entries, churn)
    mass = np.random.default_rng(seed).random(ids.shape).astype(np.float16) / width
    mass = np.where(ids < 0, 0, mass).astype(np.float32)
    made = sample_trace(64, steps, layers, topk=1)
    changes = {"topk": width, "format_version": 3, "source": "npy", "prompt_tokens": 4 * entries}
    nothing = np.zeros((steps, layers), np.float32)
    trace = replace(
        made.with_header(**changes), entry_ids=ids, mass=mass, window_mass=nothing,
        sink_mass=nothing, token_ids=None, hidden=None, index_keys=None, index_key_scales=None,
        prompt_mass=None,
    )  # fmt: skip
    traces.write(path, trace)
    read = traces.read(path, check=True)
    assert np.array_equal(np.asarray(read.entry_ids), ids)
    assert np.array_equal(np.asarray(read.mass), mass)
    assert read.entry_ids.dtype == np.int32 and read.mass.dtype == np.float32
    rng = np.random.default_rng(seed)
    for _ in range(5):
        first, end = np.sort(rng.integers(-steps, steps + 1, 2))
        layer = int(rng.integers(layers))
        assert np.array_equal(read.entry_ids[first:end], ids[first:end])
        assert np.array_equal(read.entry_ids[first:end:2, layer], ids[first:end:2, layer])
        assert np.array_equal(read.mass[:, layer], mass[:, layer])
        picked = rng.integers(steps, size=3)
        assert np.array_equal(read.entry_ids[picked, layer], ids[picked, layer])
        assert np.array_equal(read.mass[first % steps, layer], mass[first % steps, layer])
    again = path.with_name("b.safetensors")
    traces.write(again, read)
    assert again.read_bytes() == path.read_bytes()


def streams(count=3, steps=40, seed=0):
    """Traces after one prompt, whose keys were scaled one by one, as a recorder does."""
    first = sample_trace(n_steps=steps, n_layers=4, prompt_tokens=800, topk=16, seed=seed)
    prompt, rng = first.prompt_entries, np.random.default_rng(seed)
    prompt_keys = rng.normal(size=(4, prompt, first.index_keys.shape[2]))
    mass = np.zeros((4, first.total_entries), np.float32)
    mass[:, :prompt] = rng.integers(0, 2, (4, prompt))
    header = first.header.model_copy(update={"prompt_mass_queries": 8})
    found = []
    for number in range(count):
        other = sample_trace(
            n_steps=steps, n_layers=4, prompt_tokens=800, topk=16, seed=seed + number
        )
        keys = np.concatenate(
            (prompt_keys, rng.normal(size=(4, first.total_entries - prompt, prompt_keys.shape[2]))),
            1,
        )
        keys[1, prompt] *= 5 * number  # another scale
        codes, scales = float8.quantise(keys.astype(np.float32))
        tokens = np.concatenate((np.arange(800), rng.integers(0, 4000, steps))).astype(np.int32)
        found.append(
            replace(
                other, header=header.model_copy(update={"prompt_kind": f"kind {number}"}),
                index_keys=codes, index_key_scales=scales, token_ids=tokens, prompt_mass=mass,
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize("keyed", [None, (1, 3)])
def test_traces_of_one_prompt_share_a_file(tmp_path, keyed):
    made = [traces.lightened(trace, keyed, 10) for trace in streams()]
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    context = traces.write_shared(paths, made)
    assert context.parent == tmp_path and len(list(tmp_path.iterdir())) == 4
    rows = list(keyed or range(4))
    for path, trace in zip(paths, made, strict=True):
        read = traces.read(path, check=True)
        assert read.keyed == rows and read.header.prompt_kind == trace.header.prompt_kind
        assert np.array_equal(read.token_ids, trace.token_ids)
        assert np.array_equal(np.asarray(read.prompt_mass), trace.prompt_mass)
        assert np.array_equal(np.asarray(read.entry_ids), trace.entry_ids)
        assert np.allclose(read.keys(), trace.keys(), rtol=0.14, atol=0.02)
        assert read.keys(20).shape == (len(rows), 20, trace.index_keys.shape[2])
        # a trace that shares can be written alone, and reads alike
        traces.write(tmp_path / "alone" / path.name, read)
        alone = traces.read(tmp_path / "alone" / path.name, check=True)
        assert np.array_equal(alone.keys(), read.keys()) and alone.header.context_sha256 is None
    again = traces.write_shared(
        [tmp_path / "again" / path.name for path in paths], [traces.read(path) for path in paths]
    )
    assert again.read_bytes() == context.read_bytes()
    for path in paths:
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_what_is_not_of_one_prompt_shares_nothing(tmp_path):
    one, two, _ = streams()
    tokens = two.token_ids.copy()
    tokens[5] += 1
    keys = two.index_keys.copy()
    keys[0, :50] ^= 0x80
    for other, name in (
        (replace(two, token_ids=tokens), "token_ids"),
        (replace(two, index_keys=keys), "index_keys"),
        (replace(two, prompt_mass=two.prompt_mass * 0.5), "prompt_mass"),
        (two.with_header(prompt_mass_queries=9), "prompt_mass_queries"),
        (replace(two, token_ids=None), "token_ids"),
    ):
        with pytest.raises(FmsimError, match=f"{name}: is not the first trace's"):
            traces.write_shared([tmp_path / "a", tmp_path / "b"], [one, other])


def test_damage_is_told(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    context = traces.write_shared(paths, streams(2))
    sound, whole = context.read_bytes(), paths[0].read_bytes()
    for at in (-1, len(sound) // 2):
        changed = bytearray(sound)
        changed[at] ^= 1
        context.write_bytes(changed)
        with pytest.raises(FmsimError, match="context"):
            traces.read(paths[0], check=True)
    context.write_bytes(sound[:-8])
    with pytest.raises(FmsimError, match="context"):
        traces.read(paths[0], check=False)
    context.unlink()
    with pytest.raises(FmsimError, match="copy it too"):
        traces.read(paths[0])
    context.write_bytes(sound)
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(60):
        changed = bytearray(whole)
        changed[rng.integers(8, len(changed))] ^= int(rng.integers(1, 256))
        paths[0].write_bytes(changed)
        try:
            traces.read(paths[0], check=True)
        except FmsimError as error:
            told += paths[0].name in str(error)
    assert told == 60


def test_rounded_masses_are_near_and_stay():
    mass = np.random.default_rng(0).random(2000).astype(np.float32) ** 4
    near = rounded(mass, 5)
    assert (np.abs(near - mass) <= mass / 63 + 1e-6).all() and near.max() <= 1
    assert np.array_equal(rounded(near, 5), near)
    assert np.array_equal(rounded(mass, 10), mass.astype(np.float16).astype(np.float32))


def test_layers_with_keys_are_those_that_lookahead_sees():
    whole = streams(1)[0]
    light = traces.lightened(whole, (1, 3), 10)
    one, two = (Replayer(trace)._lookahead_in(None, None)(0) for trace in (whole, light))
    assert two.csa_numbers == (1, 3) and two.n_entries == one.n_entries
    assert np.array_equal(two.hidden, one.hidden[[1, 3]])
    assert np.array_equal(two.keys, one.keys[[1, 3]])
    windows, light_windows = (read_windows(t, "a", LabelRule()) for t in (whole, light))
    assert light_windows.layers == [1, 3]
    assert np.array_equal(light_windows.golden, windows.golden)
    assert np.array_equal(light_windows.hidden, windows.hidden[:, [1, 3]])
    chosen = windows.of_layers([1, 3])
    assert chosen.layers == [1, 3] and np.array_equal(chosen.keys, light_windows.keys)
    assert np.array_equal(chosen.hidden, light_windows.hidden)
    with pytest.raises(FmsimError, match=r"not of \[2\]"):
        light_windows.of_layers([1, 2])


def test_a_part_keeps_its_keyed_layers(tmp_path):
    light = traces.lightened(streams(1)[0], (1, 3), 5)
    part = cut(light, 0, 20, [1, 2])
    assert part.header.keyed == (0,) and np.array_equal(
        part.keys()[0], light.keys()[0][: part.total_entries]
    )
    traces.write(tmp_path / "part.safetensors", part)
    assert traces.read(tmp_path / "part.safetensors", check=True).csa_numbers == [1, 2]
    none = cut(light, 0, 20, [0, 2])
    assert none.index_keys is None
    traces.write(tmp_path / "none.safetensors", none)
    assert "layers" in summary(traces.read(tmp_path / "part.safetensors"))["about"]["for lookahead"]


def test_a_recorder_of_version_3_takes_keys_of_some_layers():
    whole = streams(1)[0]
    for version in (2, 3):
        header = whole.header.model_copy(update={"format_version": version})
        recorder = traces.TraceRecorder(header, whole.n_steps, whole.n_layers, whole.topk)
        for layer in range(whole.n_layers):
            recorder.step(
                0, layer, whole.entry_ids[:, layer], whole.mass[:, layer],
                whole.window_mass[:, layer], whole.sink_mass[:, layer],
            )  # fmt: skip
        for layer in (0, 2):
            recorder.index_keys(layer, whole.keys()[layer])
        if version == 2:
            with pytest.raises(FmsimError, match="2 of 4 index_keys"):
                recorder.finish(whole.token_ids, whole.forced)
        else:
            assert recorder.finish(whole.token_ids, whole.forced).keyed == [0, 2]
