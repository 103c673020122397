import json
import tracemalloc
import zipfile
from copy import copy

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from fmsim.cli.indexer import app
from fmsim.errors import FmsimError
from fmsim.indexer import checkpoint
from fmsim.indexer.checkpoint import Checkpoint
from fmsim.indexer.scorer import PUBLISHED, LayerWeights, ScorerConfig, Yarn


def published_tensors(
    layers=(10, 12, 20), hidden=12, rank=6, heads=3, head_dim=4
) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {
        "wq_a.weight": (rank, hidden),
        "wq_b.weight": (heads * head_dim, rank),
        "q_norm_weight": (rank,),
        "weights_proj.weight": (heads, hidden),
    }
    return {
        f"retrievers.l{layer}.{key}": random.standard_normal(shape).astype(np.float32)
        for layer in layers
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_published_checkpoint_is_written_back_unchanged(tmp_path, metadata):
    save_file(published_tensors(), tmp_path / "theirs.safetensors", metadata=metadata)
    found = checkpoint.load(tmp_path / "theirs.safetensors")
    assert sorted(found.layers) == [10, 12, 20]
    assert found.config == PUBLISHED and found.threshold is None
    assert (found.hidden_size, found.head_dim, found.layers[10].heads) == (12, 4, 3)
    checkpoint.save(found, tmp_path / "ours.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == (
        tmp_path / "theirs.safetensors"
    ).read_bytes()


def test_pt_holds_the_same_and_its_rotations_are_ignored(tmp_path):
    tensors = published_tensors()
    state = {key: torch.from_numpy(value) for key, value in tensors.items()}
    state["retrievers.l10.freqs_cis"] = torch.ones(4, dtype=torch.complex64)
    torch.save(state, tmp_path / "theirs.pt")
    checkpoint.save(checkpoint.load(tmp_path / "theirs.pt"), tmp_path / "ours.safetensors")
    written = load_file(tmp_path / "ours.safetensors")
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("layers", [(0,), (10, 12, 20), (6, 8, 10, 12, 14, 16, 18, 20)])
def test_any_layers_and_widths_go_from_pt_to_safetensors_and_back(tmp_path, layers):
    tensors = published_tensors(layers, hidden=20, rank=7, heads=5, head_dim=8)
    wider = published_tensors(
        layers[-1:], hidden=20, rank=9, heads=3, head_dim=8
    )  # heads and rank may differ by layer
    tensors |= wider
    save_file(tensors, tmp_path / "theirs.safetensors")
    run = CliRunner()
    for source, target in (("theirs.safetensors", "a.pt"), ("a.pt", "ours.safetensors")):
        done = run.invoke(app, ["convert", str(tmp_path / source), str(tmp_path / target)])
        assert done.exit_code == 0 and "3 heads x 8, rank 9" in done.output, done.output
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert state.keys() == tensors.keys()
    assert all(
        np.array_equal(state[key].numpy().view(np.int32), tensors[key].view(np.int32))
        for key in tensors
    )
    assert (tmp_path / "ours.safetensors").read_bytes() == (
        tmp_path / "theirs.safetensors"
    ).read_bytes()


def test_a_pt_does_not_take_what_it_cannot_hold(tmp_path):
    weights = {
        0: LayerWeights(*(np.zeros(shape, np.float32) for shape in ((5, 7), (5,), (8, 5), (2, 7))))
    }
    for unlike in (
        Checkpoint(weights, PUBLISHED, threshold=0.6),
        Checkpoint(weights, ScorerConfig(2, 1e4)),
    ):
        with pytest.raises(FmsimError, match="a.pt: .* .safetensors file"):
            checkpoint.save(unlike, tmp_path / "a.pt")
    with pytest.raises(FmsimError, match="a.bin: indexer checkpoints are written as"):
        checkpoint.save(Checkpoint(weights, PUBLISHED), tmp_path / "a.bin")


class Hostile:
    def __reduce__(self):
        return (print, ("a pickle must not run",))


def test_pt_is_loaded_as_weights_only(tmp_path, capsys):
    torch.save({"retrievers.l0.wq_a.weight": Hostile()}, tmp_path / "hostile.pt")
    with pytest.raises(FmsimError, match="hostile.pt"):
        checkpoint.load(tmp_path / "hostile.pt")
    assert "must not run" not in capsys.readouterr().out


def test_a_pt_that_would_inflate_is_refused_by_its_headers(tmp_path):
    """64 KiB that say they hold 64 MiB; and a tensor that repeats one number 2**28
    times.
    """
    with (
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("bomb/data/0", "w", force_zip64=True) as member,
    ):
        for _ in range(64):
            member.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(FmsimError, match="bomb.pt: .*members are compressed or overlap"):
        checkpoint.load(tmp_path / "bomb.pt")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("small/data/0", b"x")
        archive.writestr("small/data/1", bytes(4000), zipfile.ZIP_STORED)
    with zipfile.ZipFile(tmp_path / "twins.pt", "w") as archive:
        archive.writestr("twins/data/0", bytes(4000))
        twin = copy(archive.filelist[0])  # a second name for the same bytes
        twin.filename = "twins/data/1"
        archive.filelist.append(twin)
    for name in ("small.pt", "twins.pt"):
        with pytest.raises(FmsimError, match=f"{name}: .*members are compressed or overlap"):
            checkpoint.load(tmp_path / name)
    repeated = torch.zeros(1).expand(2**14, 2**14)
    torch.save({"retrievers.l0.wq_a.weight": repeated}, tmp_path / "wide.pt")
    with pytest.raises(FmsimError, match="wide.pt: .*larger than the file"):
        checkpoint.load(tmp_path / "wide.pt")


def test_our_header_survives(tmp_path):
    random = np.random.default_rng(1)
    shapes = ((5, 7), (5,), (8, 5), (2, 7))
    weights = {
        layer: LayerWeights(*(random.standard_normal(shape).astype(np.float32) for shape in shapes))
        for layer in (0, 3)
    }
    config = ScorerConfig(2, 1e4, Yarn(4.0, 512), hadamard=True, norm_eps=1e-5)
    served = {layer: random.standard_normal((6, 2, 7)).astype(np.float32) for layer in weights}
    ours = Checkpoint(weights, config, 0.37, {"seed": 5}, served=served)
    checkpoint.save(ours, tmp_path / "a.safetensors")
    found = checkpoint.load(tmp_path / "a.safetensors")
    assert all(np.array_equal(found.served[layer], served[layer]) for layer in (0, 3))
    assert (found.config, found.threshold, found.training) == (config, 0.37, {"seed": 5})
    assert all(
        np.array_equal(x, y)
        for layer in (0, 3)
        for x, y in zip(found.layers[layer], weights[layer], strict=True)
    )


def drop(key):
    return lambda tensors: tensors.pop(key)


def served_by(*sizes):
    """Every retriever serves so many layers with so many heads."""
    return lambda tensors: tensors.update(
        {
            f"retrievers.l{layer}.served_proj.weight": np.zeros((*size, 12), np.float32)
            for layer, size in zip((10, 12, 20), sizes)
        }
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.clear(), "no retrievers"),
        (drop("retrievers.l12.wq_b.weight"), r"l12 lacks wq_b\.weight"),
        (
            lambda tensors: tensors.update(
                {"retrievers.l10.served_proj.weight": np.zeros((6, 3, 12), np.float32)}
            ),
            "serve as many layers in every retriever",
        ),
        (served_by((6, 3), (6, 3), (5, 3)), "serve as many layers in every retriever"),
        (served_by((6, 3), (6, 4), (6, 3)), "with its heads and hidden_size"),
        (lambda tensors: tensors.update(other=np.zeros(3, np.float32)), "'other' is not"),
        (
            lambda tensors: tensors.update(
                {"retrievers.l10.q_norm_weight": np.zeros(6, np.float16)}
            ),
            "float16",
        ),
        (
            lambda tensors: tensors.update(
                {"retrievers.l10.q_norm_weight": np.zeros(7, np.float32)}
            ),
            "do not fit together",
        ),
        (lambda tensors: tensors.update(published_tensors((12,), hidden=8)), "other widths"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path, damage, message):
    tensors = published_tensors()
    damage(tensors)
    save_file(tensors, tmp_path / "c.safetensors")
    with pytest.raises(FmsimError, match=message) as error:
        checkpoint.load(tmp_path / "c.safetensors")
    assert "c.safetensors" in str(error.value)


def test_a_tensor_of_any_other_shape_is_told(tmp_path):
    """One row, one column or one axis more than fits, of each tensor in turn."""
    for name, tensor in published_tensors((10,)).items():
        wider = [np.repeat(tensor, 2, axis=axis) for axis in range(tensor.ndim)]
        if name.endswith("wq_b.weight"):
            wider[0] = tensor[:-1]  # twice the rows are heads of twice the width
        if name.endswith("weights_proj.weight"):
            wider[0] = np.concatenate((tensor, tensor[:2]))  # twice the heads have half of it
        for wrong in (*wider, tensor[..., None], tensor[0]):
            tensors = published_tensors((10,)) | {name: np.ascontiguousarray(wrong)}
            save_file(tensors, tmp_path / "c.safetensors")
            with pytest.raises(FmsimError, match="shapes of retrievers.l10 do not fit together"):
                checkpoint.load(tmp_path / "c.safetensors")


def test_missing_truncated_and_foreign_files(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(FmsimError, match="no such"):
        checkpoint.load(path)
    save_file(published_tensors(), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FmsimError, match="not a readable"):
        checkpoint.load(path)
    save_file(
        published_tensors(),
        path,
        metadata={checkpoint.METADATA_KEY: json.dumps({"scorer": {"rope": 3}})},
    )
    with pytest.raises(FmsimError, match="metadata"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["c.safetensors", "c.pt"])
def test_four_gigabytes_are_read_and_not_a_byte_more(tmp_path, name):
    """Of files with nothing in them: one is foreign, the other too large."""
    for n_bytes, says in ((2**32, "not a "), (2**32 + 1, "more than the 4,294,967,296")):
        with (tmp_path / name).open("wb") as file:
            file.truncate(n_bytes)
        with pytest.raises(FmsimError, match=says):
            checkpoint.load(tmp_path / name)


def test_misfits_are_named():
    weights = {
        2: LayerWeights(*(np.zeros(shape, np.float32) for shape in ((5, 7), (5,), (8, 5), (2, 7))))
    }
    found = Checkpoint(weights, PUBLISHED)
    found.check_fits(range(3), 7, 4, "t.safetensors")
    for misfit, message in (
        (((0, 1), 7, 4), "CSA layers"),
        (((1, 2), 8, 4), "hidden_size"),
        (((2,), 7, 5), "head_dim"),
    ):
        with pytest.raises(FmsimError, match=message):
            found.check_fits(*misfit, "t.safetensors")
