"""docs/tour.ipynb runs from top to bottom, and what is committed of it can be read as it is."""

import csv
import json

import pytest
from conftest import ROOT

from runs import HANGS

NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def pictures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def test_the_tour_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Its own assertions hold: what it computes by hand equals what train.py does. It trains for less than usual."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("TOUR_FRAMES", "6000")
    monkeypatch.setenv("TOUR_FOLDER", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in code_cells(notebook):
        cell.outputs = []
    nbclient.NotebookClient(
        notebook, timeout=HANGS, kernel_name="python3",
        resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    text = "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)
    assert "end: rest" in text
    assert "first minibatch: ratio" in text
    assert len(pictures(notebook)) == 5
    (run,) = (tmp_path / "runs").iterdir()
    with open(run / "metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == 2  # updates
    assert (run / "curves.png").exists()


def test_the_tour_can_be_read_as_it_is():
    """Whole outputs in order, no errors, nothing of the machine that it was made on, and not too large for a page."""
    content = NOTEBOOK.read_text()
    notebook = json.loads(content)
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {output["output_type"] for cell in cells for output in cell["outputs"]} <= {"stream", "display_data",
                                                                                     "execute_result"}
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell["outputs"])
    assert len(pictures(notebook)) == 5
    assert len(content) < 1_000_000
    for place in ("/home/", "/work/", "/tmp/", "/root/", "/Users/", "site-packages"):
        assert place not in content
    assert '"section 6 will train for 150,000 frames\\n"' in content  # the committed outputs are of the usual length
