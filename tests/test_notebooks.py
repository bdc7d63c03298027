"""The notebooks run from top to bottom."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
LESS = {
    "60": "20",
    "30": "10",
    "batch_size 16": "batch_size 2",
    'teacher_steps", "25"': 'teacher_steps", "5"',
}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:  # the same way, and less of it
        for much, little in LESS.items():
            cell.source = cell.source.replace(much, little)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    assert sys.executable
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    images = [
        o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})
    ]
    assert len(images) == 2
