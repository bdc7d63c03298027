"""Executes notebooks from top to bottom in this process and stores them with what they show.

    python notebooks/execute.py                  # all of them, or: make notebooks
    python notebooks/execute.py first_student

Stored are text, tables and pictures, and nothing of stderr, which has progress bars and notes; and a hash of the cells,
by which tests/test_notebooks.py knows outputs of other cells.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path(__file__).parent
KEPT = ("image/png", "text/markdown", "text/plain")  # of several forms of one output the first is kept


def digest(notebook: Any) -> str:
    """Of the code alone, in its order."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def execute(notebook: Any, **less: Any) -> Any:
    """Runs all cells and fills in their outputs.

    Args:
        notebook: of nbformat. less: other values for what the cell tagged "parameters" sets.

    Raises:
        Exception: whatever a cell raises, after a note that says which.
    """
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.display import display
    from IPython.utils.capture import capture_output

    os.environ["IPYTHONDIR"] = tempfile.mkdtemp()  # leaves a user's own history alone
    InteractiveShell.clear_instance()  # and the names of an earlier notebook
    shell, values = InteractiveShell.instance(), []
    shell.display_trap.hook = values.append  # what a cell ends in, to be shown as a picture where it is one
    notebook.metadata["executed"] = digest(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(cells, 1):
        source = cell.source
        if "parameters" in cell.metadata.get("tags", []):
            source += "".join(f"\n{name} = {value!r}" for name, value in less.items())
        with capture_output() as said:
            ended = shell.run_cell(source)
            display(*(value for value in values if value is not None))
        values.clear()
        if not ended.success:
            print(f"{said.stderr}\nin cell {count}:\n{cell.source}", file=sys.stderr)
        ended.raise_error()
        cell.execution_count, cell.outputs = count, list(_outputs(said))
    return notebook


def _outputs(said: Any) -> Iterator[Any]:
    from nbformat.v4 import new_output

    if said.stdout:
        yield new_output("stream", name="stdout", text=said.stdout)
    for shown in said.outputs:
        kind = next(kind for kind in KEPT if kind in shown.data)
        data = shown.data[kind]
        text = base64.b64encode(_small(data)).decode() if kind == "image/png" else data
        yield new_output("display_data", {kind: text})


def _small(png: bytes) -> bytes:
    """A picture in 256 colours, a third of its size."""
    made = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(made, "PNG", optimize=True)
    return made.getvalue()


def main(names: list[str]) -> int:
    import nbformat

    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        here, begin = os.getcwd(), time.process_time()
        notebook = execute(nbformat.read(path, as_version=4))
        os.chdir(here)
        nbformat.write(notebook, path)
        print(
            f"{path.name}: {time.process_time() - begin:.0f} s of the processor, {path.stat().st_size} bytes"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
