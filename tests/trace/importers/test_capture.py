"""Engines' captures: read exactly, checked, and refused by name."""

import base64
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from made_trace import make_trace
from typer.testing import CliRunner

from fmsim import trace as traces
from fmsim.cli.trace import app
from fmsim.errors import FmsimError
from fmsim.geometry import PRESETS
from fmsim.trace.importers import capture, engines, files, tables
from tests.support import captures

RNG = np.random.default_rng(3)
ROWS = captures.rows(RNG)
PROMPT = captures.PROMPT


@pytest.fixture
def model(tmp_path):
    return files.model_of(str(captures.config_file(tmp_path)), None, None, 1)


def one(tmp_path, name, content, kind, model, prompt=None):
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    [found] = files.READERS[kind](path, model, prompt)
    return capture.to_trace(found, model)


def expected(layer=0, step=0):
    ids = ROWS[PROMPT + step, layer]
    return sorted(ids[ids >= 0].tolist())


def test_a_response_of_sglang_byte_for_byte(tmp_path):
    """Two rows of one layer and two ids, written out by hand: little-endian int32, no header."""
    raw = bytes.fromhex("00000000 ffffffff 01000000 00000000 02000000 00000000")
    assert base64.b64encode(raw) == b"AAAAAP////8BAAAAAAAAAAIAAAAAAAAA"
    response = {
        "meta_info": {
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "indexer_topk": "AAAAAP////8BAAAAAAAAAAIAAAAAAAAA",
        }
    }
    model = files.model_of(None, 2, 1, 1)
    found = one(tmp_path, "a.json", response, "sglang", model)
    assert np.asarray(found.entry_ids).tolist() == [[[0, 2]]]
    assert found.header.prompt_tokens == 2 and found.mass is None
    # of the prompt's rows the first selects entry 0 alone, the second 0 and 1
    assert np.asarray(found.prompt_mass).tolist() == [[2, 1, 0]]
    assert found.header.prompt_history == "count" and found.header.prompt_mass_queries == 2


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_what_an_engine_says_is_what_the_trace_holds(kind, tmp_path, model):
    response = captures.sglang(ROWS) if kind == "sglang" else captures.vllm(ROWS)
    found = one(tmp_path, "a.json", response, kind, model)
    assert found.n_steps == captures.GENERATED - 1 and found.n_layers == captures.LAYERS
    for step in (0, 7, 28):
        for layer in range(captures.LAYERS):
            ids = np.asarray(found.entry_ids)[step, layer]
            assert ids[ids >= 0].tolist() == expected(layer, step)
    header = found.header
    assert (header.entry_tokens, header.topk, header.source) == (1, captures.TOPK, kind)
    assert header.layout.selections == (0, 1, 2) and header.layout.family == "DSA"
    counted = np.bincount(ROWS[:PROMPT, 1][ROWS[:PROMPT, 1] >= 0], minlength=found.total_entries)
    assert np.asarray(found.prompt_mass)[1].tolist() == counted.tolist()
    path = tmp_path / "t.safetensors"
    traces.write(path, found)
    again = traces.read(path, check=True)
    assert again.mass is None and not again.has_mass
    np.testing.assert_array_equal(np.asarray(again.entry_ids), np.asarray(found.entry_ids))


def test_rows_from_a_later_position(tmp_path, model):
    found = one(tmp_path, "a.json", captures.vllm(ROWS, start=33), "vllm", model)
    assert found.header.prompt_mass_queries == PROMPT - 33
    whole = one(tmp_path, "b.json", captures.vllm(ROWS), "vllm", model)
    np.testing.assert_array_equal(np.asarray(found.entry_ids), np.asarray(whole.entry_ids))


def test_npy_and_csv_hold_decode_steps(tmp_path, model):
    decode = ROWS[PROMPT:]
    arrays = one(tmp_path, "a.npy", decode, "npy", model, PROMPT)
    lines = ["time,layer,ids"]
    for step, row in enumerate(decode):
        for layer, ids in enumerate(row):
            lines.append(f"{step + 100},{layer},{' '.join(map(str, ids))}")
    table = one(tmp_path, "a.csv", "\n".join(lines), "csv", model, PROMPT)
    for found in (arrays, table):
        assert found.prompt_mass is None
        for step in range(len(decode)):
            assert np.asarray(found.entry_ids)[step, 2].tolist() == expected(2, step)


def test_dumps_of_miles(tmp_path, model):
    sample = {
        "tokens": list(range(len(ROWS) + 1)),
        "response_length": captures.GENERATED,
        "rollout_indexer_topk": ROWS,
        "reward": 0.5,
        "status": "completed",
        "metadata": {"a": [1, None, True]},
    }
    torch.save(
        {"rollout_id": 3, "metadata": {}, "samples": [sample, {"tokens": [1]}]}, tmp_path / "a.pt"
    )
    [found] = tables.read_miles(tmp_path / "a.pt", model, None)
    np.testing.assert_array_equal(found.rows, ROWS)
    assert found.prompt_tokens == PROMPT
    flat = sample | {"rollout_indexer_topk": ROWS.tobytes(), "metadata": "{}"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([flat]), tmp_path / "a.parquet")
    [found] = tables.read_miles(tmp_path / "a.parquet", model, None)
    np.testing.assert_array_equal(found.rows, ROWS)


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize("what", [Evil(), np.array(["text"]), np.array([object()]), range(3)])
def test_nothing_else_of_a_pickle_is_read(what, tmp_path, model, capsys):
    torch.save({"samples": [{"rollout_indexer_topk": what}]}, tmp_path / "a.pt")
    with pytest.raises(FmsimError, match=r"a\.pt"):
        tables.read_miles(tmp_path / "a.pt", model, PROMPT)
    assert "ran" not in capsys.readouterr().out


def changed(row, layer, ids):
    rows = ROWS.copy()
    rows[row, layer, : len(ids)] = ids
    return rows


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (changed(50, 1, [51]), "position 50, layer 1 selects entry 51.*SGLANG_DSA_FUSE_TOPK=0"),
        (changed(50, 1, [100_000]), "places in the engine's KV pool"),
        (changed(10, 2, [11]), "position 10, layer 2"),
        (changed(60, 0, [4, 4]), "position 60, layer 0 selects an entry twice"),
        (changed(45, 2, [0] * 8), "position 45, layer 2 was not captured: its row is all zeros"),
        (changed(45, 2, [-1] * 8), "position 45, layer 2 was not captured: its row selects noth"),
        (ROWS[:, :2], "46 rows of 3 layers"),
        (ROWS[:-1], "68 rows"),
    ],
)
def test_a_capture_that_cannot_be_is_refused(rows, says, tmp_path, model):
    response = captures.sglang(rows)
    response["meta_info"]["completion_tokens"] = captures.GENERATED
    with pytest.raises(FmsimError, match=says):
        one(tmp_path, "a.json", response, "sglang", model)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "no response"),
        ("[1]", "no JSON object"),
        ({"meta_info": {}}, "enable-return-indexer-topk"),
        ({"meta_info": {"indexer_topk": "?"}}, "not base64"),
        ({"meta_info": {"indexer_topk": "AAAA"}}, "no int32s"),
        ({"meta_info": {"indexer_topk": "AAAAAA=="}}, "not whole rows"),
    ],
)
def test_what_is_no_response_is_told(content, says, tmp_path, model):
    with pytest.raises(FmsimError, match=says):
        one(tmp_path, "a.json", content, "sglang", model)


@pytest.mark.parametrize("added", [2**31, 2**32, -(2**32)])
def test_no_id_is_changed_by_its_type(added, tmp_path, model):
    """An int64 id keeps its value, or is refused by its place."""
    wide = ROWS[PROMPT:].astype(np.int64)
    assert one(tmp_path, "a.npy", wide, "npy", model, PROMPT).n_steps == len(wide)
    wide[3, 2, 1] += added
    says = rf"a\.npy: position 43, layer 2 \(row 3\) has the id {wide[3, 2, 1]}, .*beyond 32 bits"
    with pytest.raises(FmsimError, match=says):
        one(tmp_path, "a.npy", wide, "npy", model, PROMPT)


@pytest.mark.parametrize("blank", [0, -1])
def test_rows_of_the_prompt_that_were_not_captured_are_left_out(blank, tmp_path, model):
    rows = ROWS.copy()
    rows[:12] = rows[20] = blank
    found = one(tmp_path, "a.json", captures.sglang(rows), "sglang", model)
    assert found.header.prompt_mass_queries == PROMPT - 13


def test_a_query_that_sees_no_entry_selects_none(tmp_path):
    """Of entries of four tokens, at positions 0 to 2: padding alone is right there."""
    rows = np.full((12, 1, 2), -1)
    rows[3:, 0, 0] = (np.arange(3, 12) + 1) // 4 - 1
    rows[6] = -1
    response = captures.sglang(rows, prompt=8)
    found = one(tmp_path, "a.json", response, "sglang", files.model_of(None, 2, 1, 4))
    assert found.header.prompt_mass_queries == 7 and found.n_steps == 4


def test_layers_that_share_a_selection_stand_there_once(tmp_path):
    rows = captures.rows(RNG, layers=5)
    rows[:, 2] = rows[:, 1, ::-1]
    rows[:, 4] = rows[:, 3]
    config = captures.config_file(tmp_path, num_hidden_layers=5)
    found = one(
        tmp_path,
        "a.json",
        captures.sglang(rows),
        "sglang",
        files.model_of(str(config), None, None, 1),
    )
    assert found.n_layers == 3 and found.header.layout.selections == (0, 1, 1, 2, 2)
    assert found.header.geometry["csa_layers"] == [0, 1, 3]


def test_vllm_captures_only_layers_that_run_an_indexer(tmp_path):
    """GLM-5.2's 78 layers have 21 selections; ids are made for two steps."""
    geometry = PRESETS["glm-5.2"]
    rows = np.tile(np.arange(16, dtype=np.int32), (102, 21, 1))
    rows[:16] = np.where(rows[:16] <= np.arange(16)[:, None, None], rows[:16], -1)
    found = one(
        tmp_path, "a.json", captures.vllm(rows, prompt=100), "vllm", capture.watched(geometry)
    )
    assert found.n_layers == 21 and found.header.layout.selections == geometry.selection_map()
    assert found.header.geometry["csa_layers"][:5] == [0, 1, 2, 6, 10]


def test_the_command_takes_a_file_or_a_folder(tmp_path):
    config = captures.config_file(tmp_path)
    (tmp_path / "in").mkdir()
    both = [captures.sglang(ROWS), captures.sglang(ROWS)]
    (tmp_path / "in" / "a.json").write_text(json.dumps(captures.sglang(ROWS)))
    (tmp_path / "in" / "b.jsonl").write_text("\n".join(map(json.dumps, both)))
    options = ["--format", "sglang", "--model", str(config)]
    run = CliRunner().invoke(
        app, ["import", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *options]
    )
    assert run.exit_code == 0, run.exception
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a.safetensors", "b-0.safetensors", "b-1.safetensors"]
    single = tmp_path / "one.safetensors"
    run = CliRunner().invoke(
        app, ["import", str(tmp_path / "in" / "a.json"), "--out", str(single), *options]
    )
    assert run.exit_code == 0 and "no masses" in run.stdout
    assert traces.read(single, check=True).n_steps == captures.GENERATED - 1


def test_a_model_must_be_said(tmp_path):
    with pytest.raises(FmsimError, match="--model, or --topk and --layers"):
        files.model_of(None, 4, None, 1)
    assert files.model_of("v3.2", None, None, 1).topk == 2048
    assert files.model_of("v4-flash", None, None, 1).entry_tokens == 4


def test_numbers_of_version_1_are_kept(tmp_path):
    made = make_trace(prompt_tokens=256, n_steps=8).with_header(format_version=1)
    traces.write(tmp_path / "old.safetensors", made)
    found = traces.read(tmp_path / "old.safetensors", check=True)
    assert found.header.format_version == 1 and found.header.entry_tokens == 4
    assert "entry_tokens" not in found.header.model_dump()
    traces.write(tmp_path / "again.safetensors", found)
    again = traces.read(tmp_path / "again.safetensors", check=True)
    assert again.header.content_sha256 == found.header.content_sha256


def test_engines_name_their_source():
    assert set(files.READERS) == set(files.SUFFIXES)
    assert set(engines.NO_CAPTURE) <= set(files.READERS)


@pytest.mark.parametrize(
    ("kind", "suffix"), [("sglang", ".json"), ("vllm", ".jsonl"), ("csv", ".csv"), ("npy", ".npy")]
)
def test_captures_are_read_by_the_strict_readers(kind, suffix, tmp_path, model):
    missing, fifo, folder = (tmp_path / f"{name}{suffix}" for name in ("a", "b", "c"))
    os.mkfifo(fifo)
    folder.mkdir()
    for path, says in ((missing, "no such file"), (fifo, "a FIFO"), (folder, "a folder")):
        with pytest.raises(FmsimError, match=says):
            list(files.import_file(path, tmp_path / "t.safetensors", kind, model, PROMPT))
    if kind in ("sglang", "vllm"):
        for text in ('{"a": 1, "a": 2}', '{"a": NaN}', "[" * 200 + "]" * 200, "\xff"):
            missing.write_bytes(text.encode("latin1"))
            with pytest.raises(FmsimError, match=r"not valid JSON|as UTF-8"):
                list(files.import_file(missing, tmp_path / "t.safetensors", kind, model, PROMPT))
