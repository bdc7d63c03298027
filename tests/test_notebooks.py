"""The notebooks run from top to bottom, and what is stored in them is what their cells show."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from processes import Fork

nbformat = pytest.importorskip("nbformat")
FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted(FOLDER.glob("*.ipynb"))}
# The same way, and less of it.
LESS = {
    "first_student": {"steps": 2, "batch": 1, "teacher_steps": 2},
    "measuring": {"steps": 1, "batch": 1, "images_per_prompt": 2, "teacher_steps": 2},
    "own_method": {"steps": 10, "batch": 1, "teacher_steps": 2},
    "comfyui_and_loras": {"steps": 1, "batch": 1, "style_steps": 1},
}
# Of errors, terminals and progress bars; absolute paths; addresses of objects.
GARBAGE = re.compile(r"Traceback|Warning|\x1b|\r|it/s\]|(?:^|[\s\"'(=])(?:/|~/|[A-Z]:\\)\w\S*| at 0x")


def _script():
    spec = importlib.util.spec_from_file_location("notebooks_execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _script()


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook):
    """Of each cell: its number, and the kinds of what it shows."""
    kinds = [[next(iter(o.get("data", {o.get("name"): 0}))) for o in cell.outputs] for cell in code(notebook)]
    return [(cell.execution_count, kind) for cell, kind in zip(code(notebook), kinds)]


def faults(notebook):
    """What nobody wants to read in a stored notebook."""
    found = []
    if notebook.metadata.get("executed") != script.digest(notebook):
        found.append("stored outputs are those of other cells; make notebooks")
    if [cell.execution_count for cell in code(notebook)] != list(range(1, len(code(notebook)) + 1)):
        found.append("cells were not executed once each from top to bottom")
    for cell in code(notebook):
        for output in cell.outputs:
            text = json.dumps({k: v for k, v in output.get("data", {}).items() if k != "image/png"})
            text += output.get("text", "")
            if (
                output.output_type not in ("stream", "display_data")
                or output.get("name", "stdout") != "stdout"
            ):
                found.append(f"{output.output_type} {output.get('name', '')}")
            if hit := re.search(
                r"Traceback|Warning|warning:|\x1b|it/s\]|(?:^|[\s\"'(=])(?:/|~/|[A-Z]:\\)\w\S*| at 0x", text
            ):
                found.append(hit[0])
    return found


def test_every_notebook_has_pictures_and_is_small():
    assert list(NOTEBOOKS) == sorted(LESS)
    for name, notebook in NOTEBOOKS.items():
        assert (FOLDER / f"{name}.ipynb").stat().st_size < 400e3, name
        assert any("image/png" in kinds for _, kinds in shown(notebook)), name


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_outputs_are_those_of_the_cells_and_fit_to_be_read(name):
    assert faults(NOTEBOOKS[name]) == []


@pytest.mark.parametrize(
    "output",
    [
        {"output_type": "stream", "name": "stderr", "text": "50%"},
        {"output_type": "stream", "name": "stdout", "text": "export in /home/me/run"},
        {"output_type": "stream", "name": "stdout", "text": "Traceback (most recent call last)"},
        {"output_type": "display_data", "data": {"text/plain": "<Image at 0x7f>"}, "metadata": {}},
        {"output_type": "error", "ename": "E", "evalue": "", "traceback": []},
    ],
)
def test_what_is_not_fit_is_found(output):
    cell = nbformat.v4.new_code_cell("1", execution_count=1, outputs=[nbformat.from_dict(output)])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata["executed"] = script.digest(notebook)
    assert len(faults(notebook)) == 1
    cell.source = "2"
    assert len(faults(notebook)) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("sdxl")  # imports once what the forks need
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_shows_what_is_stored(name, tmp_path):
    said, stored = tmp_path / "said.txt", NOTEBOOKS[name]

    def run():
        notebook = script.execute(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4), **LESS[name])
        nbformat.write(notebook, tmp_path / "executed.ipynb")

    assert Fork(run, said, {"TMPDIR": str(tmp_path)}).wait() == 0, said.read_text()
    assert shown(nbformat.read(tmp_path / "executed.ipynb", as_version=4)) == shown(stored)
