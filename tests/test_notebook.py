import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_quickstart_notebook_runs(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[dev]'")
    import nbformat

    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    parameters = notebook.cells[1]
    assert "STEPS = 600" in parameters.source and 'WORKDIR = "runs/notebook"' in parameters.source
    parameters.source = parameters.source.replace("STEPS = 600", "STEPS = 6")
    parameters.source = parameters.source.replace("runs/notebook", str(tmp_path / "run"))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert "step 6/6" in text or "6/6" in text
    assert "largest difference" in text and "\ndef " in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    if folder := os.environ.get("NOTEBOOK_OUTPUT"):
        nbformat.write(notebook, pathlib.Path(folder) / "executed.ipynb")
