"""FlashMemory's dumps as traces, traces as dumps; made dumps stand in for theirs, written as their
server writes them (pickle.dump of tensors).
"""

import itertools
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_trace import make_trace
from typer.testing import CliRunner

from fmsim import trace as traces
from fmsim.cli.trace import app
from fmsim.errors import FmsimError
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.eval import evaluate
from fmsim.indexer.labels import LabelRule, golden_mask
from fmsim.indexer.scorer import PUBLISHED, LayerWeights, ScorerConfig
from fmsim.indexer.windows import read_windows
from fmsim.policies.registry import build
from fmsim.replay.replayer import replay
from fmsim.trace import float8
from fmsim.trace.importers.flashmemory import read_document

LAYERS, HIDDEN, FIRST_POSITION, ROWS, TAU = (6, 10, 20), 24, 402, 21, 8


def made_dump(seed=0, keyed_entries=(FIRST_POSITION + ROWS) // 4):
    """A dump of three layers, and its labels as lists of (entry, score) a row."""
    random = np.random.default_rng(seed)
    labels = []
    for row in range(ROWS):
        visible = (FIRST_POSITION + row + 1) // 4
        chosen = random.permutation(visible)[: random.integers(0, 6)]
        labels.append([(int(entry), int(random.integers(3, 22))) for entry in chosen])
    dump = {
        "label_indices": torch.tensor(
            [entry for row in labels for entry, _ in row], dtype=torch.int32
        ),
        "label_scores": torch.tensor(
            [score for row in labels for _, score in row], dtype=torch.int32
        ),
        "label_pointers": torch.tensor(
            np.cumsum([0] + [len(row) for row in labels]), dtype=torch.int32
        ),
    }
    for layer in LAYERS:
        codes, scales = (
            float8.encode(random.standard_normal((keyed_entries, 128))),
            random.uniform(0.5, 2, keyed_entries).astype("<f4"),
        )
        dump[f"hidden_layer_{layer}"] = torch.from_numpy(random.standard_normal((ROWS, HIDDEN))).to(
            torch.bfloat16
        )
        dump[f"compk_layer_{layer}"] = torch.from_numpy(
            np.concatenate([codes, scales[:, None].view(np.uint8)], axis=1)
        )
        dump[f"positions_layer_{layer}"] = torch.arange(FIRST_POSITION, FIRST_POSITION + ROWS)
        dump[f"logits_layer_{layer}_token_0"] = torch.zeros(
            5, dtype=torch.bfloat16
        )  # theirs have it, for debugging
    return dump, labels


def write_dump(folder, dump, number=0):
    folder.mkdir(exist_ok=True)
    path = folder / f"doc_{number:05d}.pkl"
    path.write_bytes(pickle.dumps(dump))
    return path


def test_a_dump_as_a_trace(tmp_path):
    dump, labels = made_dump()
    trace = read_document(write_dump(tmp_path, dump), TAU)
    assert (trace.header.prompt_tokens, trace.n_steps, trace.n_layers) == (
        FIRST_POSITION + 1,
        ROWS - 1,
        3,
    )
    assert trace.holds_labels and trace.token_ids is None and not trace.forced.any()
    assert trace.csa_numbers == [6, 10, 20] and trace.header.geometry["csa_layers"] == [14, 22, 42]
    assert ScorerConfig.from_geometry(trace.header.geometry) == PUBLISHED
    for step in range(trace.n_steps):  # row 0 is the query of window 0, row t is step t - 1
        for layer in range(3):
            there = trace.entry_ids[step, layer] >= 0
            found = zip(
                trace.entry_ids[step, layer][there].tolist(),
                np.rint(21 * trace.mass[step, layer][there]).tolist(),
            )
            assert list(found) == sorted(labels[step + 1])
    for n, layer in enumerate(LAYERS):
        expected = dump[f"hidden_layer_{layer}"][::TAU].float().numpy()
        assert np.array_equal(trace.hidden[:, n], expected)
        keys = dump[f"compk_layer_{layer}"].numpy()
        values = torch.from_numpy(keys[:, :128].copy()).view(
            torch.float8_e4m3fn
        ).float().numpy() * keys[:, 128:].copy().view("<f4")
        assert np.array_equal(trace.keys()[n], values)
    traces.write(tmp_path / "a.safetensors", trace)
    again = traces.read(tmp_path / "a.safetensors", check=True)
    assert np.array_equal(np.rint(21 * np.asarray(again.mass)), np.rint(21 * trace.mass))


def test_labels_of_a_window_are_the_dumps(tmp_path):
    dump, labels = made_dump()
    trace = read_document(write_dump(tmp_path, dump), TAU)
    for rule, least in ((LabelRule(), 3), (LabelRule(min_layers=12), 12)):
        windows = read_windows(trace, "dump", rule)
        for window, entries in enumerate(windows.entries):
            ahead = [
                item
                for row in labels[1 + TAU * window : 1 + TAU * (window + 1)]
                for item in row
                if item[0] < entries
            ]
            assert np.flatnonzero(windows.golden[window]).tolist() == sorted(
                {entry for entry, score in ahead if score >= least}
            )
            assert windows.mass[window].sum() == pytest.approx(
                sum(score for _, score in ahead) / 21, rel=1e-3
            )


def retrievers(seed=0):
    random = np.random.default_rng(seed)
    shapes = ((12, HIDDEN), (12,), (4 * 128, 12), (4, HIDDEN))
    return Checkpoint(
        {
            layer: LayerWeights(
                *(random.standard_normal(shape).astype(np.float32) for shape in shapes)
            )
            for layer in (10, 20)
        },
        PUBLISHED,
    )


def test_a_checkpoint_scores_the_layers_it_names(tmp_path):
    trace = read_document(write_dump(tmp_path, made_dump()[0]), TAU)
    windows = read_windows(trace, "dump", LabelRule())
    found = evaluate(retrievers(), [(trace, windows)], shares=[0.5])
    assert {"lsa (l10)", "lsa (l20)"} <= found["golden_recall"].keys()
    swapped = replace(
        trace,
        hidden=trace.hidden[:, ::-1],
        index_keys=trace.index_keys[::-1],
        index_key_scales=trace.index_key_scales[::-1],
    )
    swapped = swapped.with_header(geometry=trace.header.geometry | {"csa_numbers": [20, 10, 6]})
    turned = evaluate(
        retrievers(), [(swapped, read_windows(swapped, "dump", LabelRule()))], shares=[0.5]
    )
    assert turned["golden_recall"]["lsa (max)"] == found["golden_recall"]["lsa (max)"]
    without = Checkpoint({8: retrievers().layers[10]}, PUBLISHED)
    with pytest.raises(FmsimError, match="CSA layers"):
        evaluate(without, [(trace, windows)])


def test_a_replay_counts_labels_as_golden(tmp_path):
    from fmsim.indexer import checkpoint

    checkpoint.save(retrievers(), tmp_path / "i.safetensors")
    trace = read_document(write_dump(tmp_path, made_dump()[0]), TAU)
    ledger = replay(
        trace,
        build(
            {
                "policy": "lsa",
                "checkpoint": str(tmp_path / "i.safetensors"),
                "budget": "50%",
                "threshold": 0.01,
            }
        ),
    )
    assert np.array_equal(ledger.golden, ledger.accessed)
    assert 0 < ledger.golden_hit.sum() < ledger.golden.sum()


def exported(tmp_path, trace, *options):
    traces.write(tmp_path / "t.safetensors", trace)
    run = CliRunner().invoke(
        app, ["export", str(tmp_path / "t.safetensors"), "--out", str(tmp_path / "out"), *options]
    )
    assert run.exit_code == 0, run.output
    return tmp_path / "out", run.output


def test_an_imported_dump_is_exported_as_it_was(tmp_path):
    dump, labels = made_dump()
    trace = read_document(write_dump(tmp_path / "theirs", dump), TAU)
    folder, _ = exported(tmp_path, trace)
    with (folder / "doc_00000.pkl").open("rb") as file:
        ours = pickle.load(file)  # as FlashMemory's trainer reads it
    assert all(isinstance(value, torch.Tensor) for value in ours.values())
    assert ours.keys() == {key for key in dump if not key.startswith("logits")}
    for key in ours:
        assert ours[key].dtype == dump[key].dtype, key
    for layer in LAYERS:
        assert torch.equal(ours[f"compk_layer_{layer}"], dump[f"compk_layer_{layer}"])
        assert torch.equal(ours[f"positions_layer_{layer}"], dump[f"positions_layer_{layer}"])
        assert torch.equal(
            ours[f"hidden_layer_{layer}"][::TAU], dump[f"hidden_layer_{layer}"][::TAU]
        )
        assert ours[f"hidden_layer_{layer}"][1].isnan().all()
    pointers = ours["label_pointers"].tolist()
    rows = [slice(*pair) for pair in itertools.pairwise(pointers)]
    written = [
        list(zip(ours["label_indices"][row].tolist(), ours["label_scores"][row].tolist()))
        for row in rows
    ]
    assert written == [[], *(sorted(row) for row in labels[1:])]
    assert_same_labels(read_document(folder / "doc_00000.pkl", TAU), trace)


def assert_same_labels(one, other):
    assert np.array_equal(one.entry_ids, other.entry_ids)
    np.testing.assert_allclose(one.mass, other.mass, atol=1e-3)
    for name in ("hidden", "index_keys"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert np.array_equal(one.keys(), other.keys())


def test_a_recorded_trace_goes_out_and_comes_back(tmp_path):
    trace = make_trace(prompt_tokens=512, n_steps=130)
    states = torch.from_numpy(trace.hidden.astype(np.float32)).bfloat16().float().numpy()
    trace = replace(trace, hidden=states)
    folder, said = exported(tmp_path, trace, "--min-layers", "2", "--head-share", "0.5")
    assert "--sample-interval 64" in said and "(4096, 128)" in said
    back = read_document(folder / "doc_00000.pkl")
    assert back.header.model == trace.header.model and back.header.geometry["label_layers"] == 3
    assert back.csa_numbers == [0, 1, 2] and np.array_equal(back.hidden, trace.hidden)
    np.testing.assert_array_equal(back.keys(), trace.keys())
    golden = golden_mask(trace.mass, 0.5)
    for step in range(130):
        layers = [
            set(trace.entry_ids[step, layer][golden[step, layer]].tolist()) for layer in range(3)
        ]
        expected = {
            entry: sum(entry in chosen for chosen in layers) for entry in set().union(*layers)
        }
        there = back.entry_ids[step, 0] >= 0
        found = dict(
            zip(
                back.entry_ids[step, 0][there].tolist(),
                np.rint(3 * back.mass[step, 0][there]).tolist(),
            )
        )
        assert found == {entry: count for entry, count in expected.items() if count >= 2}


def test_the_same_trace_gives_the_same_bytes(tmp_path):
    trace = make_trace(prompt_tokens=256, n_steps=10)
    first, _ = exported(tmp_path, trace)
    before = (first / "doc_00000.pkl").read_bytes()
    again, _ = exported(tmp_path, trace)
    assert (again / "doc_00000.pkl").read_bytes() == before
    assert len((again / "server_metadata.jsonl").read_text().splitlines()) == 1


def test_labels_beyond_the_history_and_missing_keys_are_counted(tmp_path):
    dump, labels = made_dump(
        keyed_entries=FIRST_POSITION // 4
    )  # the prompt's keys alone: no second pass
    dump["label_indices"][-1] = 4000
    trace = read_document(write_dump(tmp_path, dump), TAU)
    total = (FIRST_POSITION + ROWS) // 4
    assert trace.header.quality["labels_dropped"] == 1
    assert trace.header.quality["entries_without_keys"] == total - FIRST_POSITION // 4
    assert not trace.keys()[:, FIRST_POSITION // 4 :].any()
    assert trace.header.quality["labels"] == sum(map(len, labels[1:])) - 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda dump: dump.pop("label_scores"), "lacks label_scores"),
        (lambda dump: dump.pop("compk_layer_10"), "lacks compk_layer_10"),
        (
            lambda dump: [dump.pop(f"hidden_layer_{layer}") for layer in LAYERS],
            "holds no hidden_layer",
        ),
        (lambda dump: dump["positions_layer_20"].add_(1), "positions_layer_20"),
        (lambda dump: dump["positions_layer_6"].__setitem__(3, 9), "positions_layer_6"),
        (lambda dump: dump["label_pointers"].__setitem__(-1, 10_000), "label_pointers"),
        (lambda dump: dump["label_pointers"].__setitem__(5, 10_000), "label_pointers"),
        (lambda dump: dump["label_scores"].__setitem__(0, 22), "22"),
        (lambda dump: dump["label_indices"].__setitem__(0, -1), "negative"),
        (
            lambda dump: dump["hidden_layer_10"].__setitem__(TAU, float("nan")),
            "no finite hidden state",
        ),
        (lambda dump: dump.update(hidden_layer_10=torch.zeros(ROWS, 5)), "hidden_layer_10"),
        (lambda dump: dump.update(compk_layer_10=torch.zeros(50, 132)), "compk_layer_10"),
        (
            lambda dump: [
                dump.update({f"compk_layer_{layer}": torch.zeros(50, 36, dtype=torch.uint8)})
                for layer in LAYERS
            ],
            "32 wide",
        ),
    ],
)
def test_a_damaged_dump_is_one_clear_error(tmp_path, damage, said):
    dump, _ = made_dump()
    damage(dump)
    with pytest.raises(FmsimError, match="doc_00000.pkl") as error:
        read_document(write_dump(tmp_path, dump), TAU)
    assert said in str(error.value)


def test_import_reads_a_folder_in_order_and_refuses_a_hostile_one(tmp_path):
    for number in (0, 3):
        write_dump(tmp_path / "dumps", made_dump(number)[0], number)
    command = [
        "import",
        "--format",
        "flashmemory",
        str(tmp_path / "dumps"),
        "--out",
        str(tmp_path / "traces"),
        "--tau",
        str(TAU),
    ]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0 and "2 traces" in run.output, run.output
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == [
        "doc_00000.safetensors",
        "doc_00003.safetensors",
    ]
    (tmp_path / "dumps" / "doc_00001.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    refused = CliRunner().invoke(app, command).exception
    assert isinstance(refused, FmsimError)
    assert "doc_00001.pkl: refused: it has the opcode STRING, which no tensor needs" in str(refused)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "dumps" / "server_metadata.jsonl").write_text(
        json.dumps({"filename": "doc_00000.pkl", "fmsim_trace": {"tau": 1}})
    )
    with pytest.raises(FmsimError, match="server_metadata"):
        read_document(tmp_path / "dumps" / "doc_00000.pkl", TAU)
    header = make_trace(prompt_tokens=256, n_steps=10).header.model_dump()
    (tmp_path / "dumps" / "server_metadata.jsonl").write_text(
        json.dumps({"filename": "doc_00000.pkl", "fmsim_trace": header})
    )
    with pytest.raises(FmsimError, match="describes other layers"):
        read_document(tmp_path / "dumps" / "doc_00000.pkl", TAU)
    with pytest.raises(FmsimError, match="no doc_"):
        CliRunner().invoke(
            app, ["import", str(tmp_path), "--out", str(tmp_path / "x")], catch_exceptions=False
        )


def test_a_dense_trace_is_not_exported(tmp_path):
    traces.write(tmp_path / "t.safetensors", replace(make_trace(), hidden=None))
    with pytest.raises(FmsimError, match="holds no hidden"):
        CliRunner().invoke(
            app,
            ["export", str(tmp_path / "t.safetensors"), "--out", str(tmp_path)],
            catch_exceptions=False,
        )
