"""Every notebook runs from top to bottom in plain Python, and its committed outputs are those of one clean run."""

import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
PLACES = ("/work", "/home", "/tmp", "/root", "/Users", "site-packages")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@each_notebook
@pytest.mark.usefixtures("unchecked", "hastily")
def test_code_runs(path):
    plt.switch_backend("Agg")
    namespace = {}
    with mpl.rc_context():
        for i, cell in enumerate(code_cells(path)):
            exec(compile("".join(cell["source"]), f"{path.name}, code cell {i + 1}", "exec"), namespace)
            plt.close("all")


@each_notebook
def test_outputs_are_those_of_one_clean_run(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert "stderr" not in {output.get("name") for output in outputs}
    assert any("image/png" in output.get("data", {}) for output in outputs)


@each_notebook
def test_text_names_no_place_on_a_machine(path):
    notebook = json.loads(path.read_text())
    for output in (output for cell in notebook["cells"] for output in cell.get("outputs", [])):
        output.get("data", {}).pop("image/png", None)  # base64 may spell anything
    text = json.dumps(notebook)
    assert [place for place in PLACES if place in text] == []
