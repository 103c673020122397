"""Traces: what is written is read back, reading maps instead of loading, and what is damaged is
told in one line.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsim import trace as traces
from fmsim.errors import FmsimError
from fmsim.trace import float8
from fmsim.trace.format import METADATA_KEY, decode_blocked_ids, encode_blocked_ids
from fmsim.trace.summary import summary


def made(
    prompt_tokens=40, steps=10, layers=2, topk=4, tau=4, seed=0, lookahead=True
) -> traces.Trace:
    """A sound trace of made-up accesses: for the container, not for what is in it."""
    rng = np.random.default_rng(seed)
    header = traces.TraceHeader(
        geometry={
            "csa_layers": list(range(layers)),
            "index_topk": topk,
            "hidden_size": 5,
            "index_head_dim": 6,
        },
        model=traces.ModelInfo(name="made", dtype="float32"),
        source="deepseek_v4",
        prompt_kind="made",
        prompt_tokens=prompt_tokens,
        prompt_mass_queries=8,
        seed=seed,
        tau=tau,
        device="cpu",
        created="2026-01-01T00:00:00+00:00",
    )
    recorder = traces.TraceRecorder(header, steps, layers, topk)
    entries = (prompt_tokens + steps) // 4
    for layer in range(layers):
        for step in range(steps):
            visible = (prompt_tokens + step + 1) // 4
            ids = rng.choice(visible, min(topk, visible), replace=False)
            recorder.step(step, layer, ids, np.full(len(ids), 0.5 / len(ids)), 0.4, 0.1)
        recorder.prompt_mass(layer, rng.random(prompt_tokens // 4))
        if lookahead:
            recorder.index_keys(layer, rng.normal(size=(entries, 6)))
            for window in range(-(-steps // tau)):
                recorder.hidden(window, layer, rng.normal(size=5))
    return recorder.finish(rng.integers(0, 4096, prompt_tokens + steps), rng.random(steps) < 0.5)


def assert_equal(one: traces.Trace, other: traces.Trace) -> None:
    for name in ("entry_ids", "token_ids", "forced", "index_keys", "index_key_scales"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        assert a is None or np.array_equal(np.asarray(a), np.asarray(b)), name
    for name in ("mass", "window_mass", "sink_mass", "hidden", "prompt_mass"):
        a, b = getattr(one, name), getattr(other, name)
        assert a is None or np.allclose(np.asarray(a), np.asarray(b), atol=5e-3), name


@settings(max_examples=25, deadline=None)
@given(
    prompt_tokens=st.integers(8, 200),
    steps=st.integers(1, 20),
    layers=st.integers(1, 3),
    topk=st.integers(1, 6),
    tau=st.integers(1, 8),
    lookahead=st.booleans(),
    seed=st.integers(0, 9),
)
def test_what_is_written_is_read_back(
    tmp_path_factory, prompt_tokens, steps, layers, topk, tau, lookahead, seed
):
    path = tmp_path_factory.mktemp("trace") / "a.safetensors"
    written = made(prompt_tokens, steps, layers, topk, tau, seed, lookahead)
    traces.write(path, written)
    read = traces.read(path, check=True)
    assert_equal(written, read)
    assert read.header.model_dump(exclude={"content_sha256"}) == written.header.model_dump(
        exclude={"content_sha256"}
    )
    again = path.with_name("b.safetensors")
    traces.write(again, read)
    assert again.read_bytes() == path.read_bytes()


def test_wide_ids_and_tokens_keep_their_width(tmp_path):
    trace = made(prompt_tokens=4 * 70_000, steps=2, topk=2, lookahead=False)
    traces.write(tmp_path / "wide.safetensors", trace)
    assert_equal(trace, traces.read(tmp_path / "wide.safetensors"))
    trace.token_ids[0] = 100_000
    traces.write(tmp_path / "wide.safetensors", trace)
    assert traces.read(tmp_path / "wide.safetensors", check=True).token_ids[0] == 100_000


def test_opening_a_trace_does_not_read_its_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    traces.write(path, made())
    data = bytearray(path.read_bytes())
    data[-40:] = b"\xff" * 40  # a change that only reading can see
    path.write_bytes(data)
    assert traces.read(path, check=False).n_steps == 10
    with pytest.raises(FmsimError, match="index_keys"):
        traces.read(path, check=True)


@pytest.mark.parametrize("cut", [0, 5, 9, 60, 1500, -1])
def test_a_truncated_file_is_told(tmp_path, cut):
    path = tmp_path / "a.safetensors"
    traces.write(path, made())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(FmsimError, match="a.safetensors"):
        traces.read(path, check=True)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10**6), value=st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed_or_crashes(tmp_path_factory, place, value):
    path = tmp_path_factory.mktemp("flip") / "a.safetensors"
    traces.write(path, made())
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= value
    path.write_bytes(data)
    with pytest.raises(FmsimError, match="a.safetensors"):
        traces.read(path, check=True)


def test_foreign_and_newer_files_are_told(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FmsimError, match="x.safetensors"):
        traces.read(path)
    path.write_bytes(b"\x80\x04\x95 a pickle, say, and long enough")
    with pytest.raises(FmsimError, match="not a safetensors file"):
        traces.read(path)
    traces.write(path, made())
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    header = json.loads(table["__metadata__"][METADATA_KEY]) | {"format_version": 4}
    table["__metadata__"][METADATA_KEY] = json.dumps(header)
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(FmsimError, match="format_version"):
        traces.read(path)


def test_an_unsound_trace_is_not_written(tmp_path):
    for name, place, value, said in (
        ("entry_ids", (3, 0, 0), 10_000, "entry_ids"),
        ("mass", (3, 0, 0), np.nan, "mass"),
        ("mass", (3, 0, 0), 1.5, "mass"),
        ("token_ids", 0, -1, "token_ids"),
    ):
        trace = made()
        getattr(trace, name)[place] = value
        with pytest.raises(FmsimError, match=said):
            traces.write(tmp_path / "never.safetensors", trace)
    assert not list(tmp_path.iterdir())


def test_a_recorder_wants_every_step():
    trace = made()
    recorder = traces.TraceRecorder(trace.header, 10, 2, 4)
    recorder.step(0, 0, np.array([1]), np.array([0.5]), 0.4, 0.1)
    with pytest.raises(FmsimError, match="step 0, layer 1"):
        recorder.finish(np.zeros(50, int), np.zeros(10, bool))


def float8_by_definition() -> np.ndarray:
    """float64 [256]: the value of every code, from the paper's table 1."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size[[0x7F, 0xFF]] = np.nan
    return np.where(codes < 128, size, -size)


def test_every_float8_code_is_its_definitions_value():
    values = float8.decode(np.arange(256, dtype=np.uint8))
    assert values.dtype == np.float32 and np.signbit(values[128])
    assert np.array_equal(values, float8_by_definition(), equal_nan=True)


def test_float8_rounds_to_the_nearest_and_ties_to_the_even_code():
    grid = float8_by_definition()[:127]
    random = np.random.default_rng(0)
    any_bits = random.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    usual = random.normal(size=5000) * np.logspace(-4, 2.8, 5000)
    ties = (grid[1:] + grid[:-1]) / 2
    values = np.concatenate([usual, ties, grid, [0.0, 1e30, np.inf]]).astype(np.float32)
    values = np.concatenate([values, -values, any_bits[~np.isnan(any_bits)]])
    distance = np.abs(np.abs(values.astype(np.float64)).clip(max=448)[:, None] - grid)
    nearest = distance == distance.min(axis=1, keepdims=True)
    even = nearest & (np.arange(127) % 2 == 0)
    expected = np.where(nearest.sum(axis=1) == 2, even.argmax(axis=1), nearest.argmax(axis=1))
    expected = expected + 128 * np.signbit(values)
    assert np.array_equal(float8.encode(values), expected)
    assert np.isin(float8.encode(np.array([np.nan, -np.nan])), float8.NAN_CODES).all()


def test_float8_is_torchs():
    torch = pytest.importorskip("torch", reason="the other implementation is torch's")
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(float8.decode(codes), expected, equal_nan=True)
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    values = (values * np.logspace(-4, 2.6, 5000, dtype=np.float32)).clip(-448, 448)
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(float8.encode(values), expected)


def test_the_summary_by_hand(tmp_path):
    trace = made(steps=4, layers=1, topk=2, tau=4)
    trace.entry_ids[:, 0] = [[0, 1], [0, 2], [0, 3], [0, 4]]
    trace.mass[:, 0] = [[0.4, 0.1]] * 4
    [row] = summary(trace)["layers"]
    assert row["mass_on_entries"] == pytest.approx(0.5)
    assert row["union_of_a_window"] == 5 / 10  # entries 0 to 4 of the prompt's ten
    assert row["carrying_95%"] == 4 / 10  # 1.6 of 2.0 on entry 0, then 0.1 each: four reach 1.9


@settings(max_examples=50, deadline=None)
@given(data=st.data(), total_entries=st.integers(65_536, 300_000))
def test_ids_of_long_traces_come_back_from_their_low_bits_and_block_counts(data, total_entries):
    ids = st.lists(st.integers(0, total_entries - 1), max_size=7, unique=True)
    rows = data.draw(st.lists(ids, min_size=1, max_size=6))
    padded = np.array([sorted(row) + [-1] * (7 - len(row)) for row in rows], np.int32)
    low, blocks = encode_blocked_ids(padded, total_entries)
    assert low.dtype == blocks.dtype == np.uint16
    assert np.array_equal(decode_blocked_ids(low, blocks), padded)


def test_a_long_trace_takes_two_bytes_an_id_and_is_read_by_parts(tmp_path):
    path = tmp_path / "long.safetensors"
    written = made(prompt_tokens=600_000, lookahead=False, topk=6)
    traces.write(path, written)
    read = traces.read(path, check=True)
    assert_equal(written, read)
    assert read.entry_ids.stored.dtype == np.uint16 and read.entry_ids.dtype == np.int32
    for key in (3, (3, 1), slice(2, 5), (slice(None), 1), (3, 1, slice(0, 2))):
        assert np.array_equal(read.entry_ids[key], written.entry_ids[key])
