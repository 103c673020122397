"""The notebooks run from the first cell to the last."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install fmsim[test]")
nbclient = pytest.importorskip("nbclient", reason="pip install fmsim[test]")
pytest.importorskip("ipykernel", reason="pip install fmsim[test]")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel is a process of its own
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = " ".join(output.get("text", "") for output in outputs)
    if path.stem == "policy_in_an_afternoon":
        assert "policy peeking, step" in text and "`evidence` is 'position'" in text
        kinds = [kind for output in outputs for kind in output.get("data", {})]
        assert kinds.count("application/vnd.plotly.v1+json") == 3
