"""Every way in which a trace file can be wrong is told in one line that names the file and the
field.
"""

import json
import resource

import numpy as np
import pytest
from made_trace import make_trace
from safetensors.numpy import save_file

from fmsim import trace as traces
from fmsim.errors import FmsimError
from fmsim.trace.format import METADATA_KEY, TENSORS


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "sound.safetensors"
    traces.write(path, make_trace(prompt_tokens=256, n_steps=8, n_layers=2))
    return path.read_bytes()


@pytest.fixture
def holding(sound, tmp_path):
    """The bytes of a trace that holds the tensor ``name``; only a long one has blocks of ids, only
    a packed one ends of chunks.
    """

    def find(name: str) -> bytes:
        if name in ("entry_ends", "mass_ends"):
            packed = make_trace(prompt_tokens=256, n_steps=8, n_layers=2)
            traces.write(tmp_path / "packed.safetensors", packed.with_header(format_version=3))
            return (tmp_path / "packed.safetensors").read_bytes()
        if name != "entry_blocks":
            return sound
        path = tmp_path / "long.safetensors"
        traces.write(path, make_trace(prompt_tokens=264_000, n_steps=2, n_layers=1))
        return path.read_bytes()

    return find


def parts(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(table: dict, data: bytes) -> bytes:
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


def told(path, data: bytes, check: bool | None = False) -> str:
    """The error that reading ``data`` gives; it is one line and begins with the file."""
    path.write_bytes(data)
    with pytest.raises(FmsimError) as error:
        traces.read(path, check)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_of_another_shape_type_or_place(name, holding, tmp_path):
    path, whole = tmp_path / "trace.safetensors", holding(name)
    for key, value in (
        ("shape", [1, 7]),
        ("dtype", "F64"),
        ("dtype", 5),
        ("data_offsets", [0]),
        ("data_offsets", [-4, 4]),
        ("shape", "x"),
    ):
        table, data = parts(whole)
        table[name][key] = value
        assert name in told(path, joined(table, data))


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_whose_shape_fits_its_bytes_but_not_the_others(name, holding, tmp_path):
    table, data = parts(holding(name))
    table[name]["shape"] = [*table[name]["shape"], 1]
    assert name in told(tmp_path / "trace.safetensors", joined(table, data))


@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_tensor(name, holding, tmp_path):
    table, data = parts(holding(name))
    del table[name]
    told(tmp_path / "trace.safetensors", joined(table, data))


def test_ids_without_the_blocks_that_a_long_trace_needs(sound, tmp_path):
    table, data = parts(sound)
    header = json.loads(table["__metadata__"][METADATA_KEY]) | {"prompt_tokens": 400_000}
    table["__metadata__"][METADATA_KEY] = json.dumps(header)
    assert "entry_blocks: are missing" in told(tmp_path / "trace.safetensors", joined(table, data))


def test_tensors_that_overlap_leave_holes_or_are_unknown(sound, tmp_path):
    path = tmp_path / "trace.safetensors"
    table, data = parts(sound)
    table["sink_mass"]["data_offsets"] = table["window_mass"]["data_offsets"]
    assert "starts at byte" in told(path, joined(table, data))
    table, data = parts(sound)
    table["extra"] = {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]}
    assert "extra" in told(path, joined(table, data + b"x"))
    assert "end at byte" in told(path, sound + b"x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt_tokens", 255 + 64),
        ("prompt_tokens", 0),
        ("tau", 3),
        ("geometry", {}),
        ("source", ""),
        ("colour", "red"),
        ("model", "nano"),
        ("format_version", 0),
        ("format_version", "1"),
    ],
)
def test_a_header_that_contradicts_the_tensors_or_itself(key, value, sound, tmp_path):
    table, data = parts(sound)
    header = json.loads(table["__metadata__"][METADATA_KEY]) | {key: value}
    table["__metadata__"][METADATA_KEY] = json.dumps(header)
    told(tmp_path / "trace.safetensors", joined(table, data))


@pytest.mark.parametrize("key", ["csa_layers", "index_topk", "hidden_size", "index_head_dim"])
def test_a_geometry_that_contradicts_the_tensors(key, sound, tmp_path):
    for value in (None, "2", 1, [2, 4, 6, 8], True):
        table, data = parts(sound)
        header = json.loads(table["__metadata__"][METADATA_KEY])
        header["geometry"][key] = value
        table["__metadata__"][METADATA_KEY] = json.dumps(header)
        told(tmp_path / "trace.safetensors", joined(table, data))


def test_what_a_command_reads_is_checked_once(sound, tmp_path, monkeypatch):
    """A mass of a step moved to another legal value is found by the digest alone; a file that was
    found sound is not read through again until it changes.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "trace.safetensors"
    table, data = parts(sound)
    begin, _ = table["mass"]["data_offsets"]
    flipped = bytearray(data)
    flipped[begin] ^= 1
    assert "content_sha256: does not match" in told(path, joined(table, bytes(flipped)), None)
    path.write_bytes(sound)
    traces.read(path)
    [note] = (tmp_path / "cache").rglob("*/sound-traces/*")
    monkeypatch.setattr("fmsim.trace.reader.validate", lambda trace: pytest.fail("read again"))
    traces.read(path)
    note.unlink()
    with pytest.raises(pytest.fail.Exception, match="read again"):
        traces.read(path)
    monkeypatch.setenv("FMSIM_VERIFY", "0")
    traces.read(path)


def test_a_cache_folder_that_cannot_be_written_only_costs_time(sound, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = tmp_path / "trace.safetensors"
    path.write_bytes(sound)
    assert traces.read(path).n_steps == traces.read(path).n_steps == 8


@pytest.mark.parametrize(
    ("value", "said"),
    [(60_000.0, "between 0 and 1"), (np.nan, "between 0 and 1"), (-1.0, "between 0 and 1")],
)
def test_a_damaged_mass_names_its_tensor_step_and_layer(value, said, sound, tmp_path):
    table, data = parts(sound)
    begin, end = table["mass"]["data_offsets"]
    damaged = bytearray(data)
    masses = np.frombuffer(damaged, np.float16, (end - begin) // 2, begin)
    masses.reshape(table["mass"]["shape"])[5, 1, 0] = value
    message = told(tmp_path / "trace.safetensors", joined(table, bytes(damaged)), None)
    assert f"mass: at step 5, layer 1: a mass is not {said}" in message


def test_hostile_and_foreign_files(sound, tmp_path):
    path = tmp_path / "trace.safetensors"
    assert "claims a header" in told(path, (1 << 62).to_bytes(8, "little") + sound[8:])
    assert "announced" in told(path, (1 << 19).to_bytes(8, "little") + sound[8:])
    assert "JSON" in told(path, (1000).to_bytes(8, "little") + b'{"a":' + b"[" * 995)
    assert "JSON" in told(path, (12).to_bytes(8, "little") + b'{"a":1,"a":2}')
    table, data = parts(sound)
    table["__metadata__"][METADATA_KEY] = "[1]"
    assert METADATA_KEY in told(path, joined(table, data))
    save_file({"weight": np.zeros(3, np.float32)}, path)
    assert "so no trace" in told(path, path.read_bytes())
    with pytest.raises(FmsimError, match="is a directory"):
        traces.read(tmp_path)


@pytest.mark.parametrize(
    ("field", "place", "value", "said"),
    [
        ("entry_ids", (5, 1, 0), -2, "negative"),
        ("entry_ids", (5, 1, -1), (256 + 6) // 4, "not yet visible"),
        ("entry_ids", (5, 1, slice(0, 2)), [3, 3], "twice"),
        ("entry_ids", (5, 1, slice(0, 2)), [9, 8], "ascending"),
        ("entry_ids", (5, 1, 0), -1, "padding"),
        ("entry_ids", (5, 1, -1), -1, "padding has mass"),
        ("mass", (5, 1, 0), np.nan, "between 0 and 1"),
        ("mass", (5, 1, 0), -0.1, "between 0 and 1"),
        ("mass", (5, 1), 0.0, "sums to"),
        ("window_mass", (5, 1), 1.5, "between 0 and 1"),
        ("sink_mass", (5, 1), np.inf, "between 0 and 1"),
        ("window_mass", (5, 1), 0.9, "sums to"),
    ],
)
def test_values_that_cannot_be_name_step_and_layer(field, place, value, said):
    trace = make_trace(prompt_tokens=256, n_steps=8, n_layers=2)
    getattr(trace, field)[place] = value
    with pytest.raises(FmsimError, match=f"step 5, layer 1: .*{said}"):
        traces.validate(trace)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("token_ids", -1),
        ("hidden", np.inf),
        ("index_keys", 0x7F),
        ("index_key_scales", 0),
        ("prompt_mass", np.nan),
    ],
)
def test_values_that_cannot_be_outside_the_steps(field, value):
    trace = make_trace(prompt_tokens=256, n_steps=8, n_layers=2)
    getattr(trace, field).flat[0] = value
    with pytest.raises(FmsimError, match=field):
        traces.validate(trace)


def test_a_failed_write_leaves_the_old_file(sound, tmp_path, monkeypatch):
    path = tmp_path / "trace.safetensors"
    path.write_bytes(sound)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fmsim.files.os.fsync", full)
    with pytest.raises(FmsimError, match="No space left"):
        traces.write(path, make_trace(prompt_tokens=256, n_steps=8))
    assert path.read_bytes() == sound
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_larger_than_memory_opens(sound, tmp_path):
    """48 GiB of holes: reading a row touches a page, not the file."""
    table, _ = parts(sound)
    header = json.loads(table["__metadata__"][METADATA_KEY])
    steps, layers, topk, prompt = 1 << 18, 32, 1024, 1 << 18
    header["geometry"] |= {"csa_layers": list(range(layers)), "index_topk": topk}
    header |= {"prompt_tokens": prompt, "content_sha256": None}
    axes = {"T": steps, "L": layers, "K": topk, "N": prompt + steps}
    new, end = {"__metadata__": {METADATA_KEY: json.dumps(header)}}, 0
    for name, code, width in (
        ("entry_ids", "I32", 4),
        ("token_ids", "I32", 4),
        ("mass", "F16", 2),
        ("window_mass", "F16", 2),
        ("sink_mass", "F16", 2),
        ("forced", "BOOL", 1),
    ):
        shape = [axes[axis] for axis in TENSORS[name].axes]
        new[name] = {
            "dtype": code,
            "shape": shape,
            "data_offsets": [end, end := end + int(np.prod(shape, dtype=np.int64)) * width],
        }
    path = tmp_path / "huge.safetensors"
    path.write_bytes(joined(new, b""))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trace = traces.read(path, check=False)
    assert trace.entry_ids[12_345, 3].shape == (topk,) and not trace.mass[-1, -1].any()
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10
    )  # KiB; window and sink mass take 96 MiB with their stored form
