"""The lab as a notebook: every cell runs, in a real kernel, from the first to the last."""

import copy
import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from test_examples import DEAD_PROXY

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "lab.ipynb"
QUICK = "SHARE_OF_EPOCHS = 0.001\nLIMIT_EXAMPLES = 400\nMEMBERS = 2"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def parameters(notebook):
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    return cell


def test_it_is_kept_without_results(notebook):
    nbformat.validate(notebook)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    # Other values for the quick form, and no other names.
    names = re.compile(r"^(\w+) = ", re.MULTILINE)
    assert names.findall(parameters(notebook).source) == names.findall(QUICK)
    # The whole lab: its sections, and questions to each.
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    sections = re.findall(r"^#{2,3} (\d(?:\.\d)?)", text, re.MULTILINE)
    assert sections == ["1", "2", "3", "4", "4.1", "4.2", "5", "6"]
    questions = [int(number) for number in re.findall(r"\*\*Q(\d+)\.\*\*", text)]
    assert questions == list(range(1, len(questions) + 1))
    assert len(questions) >= 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq")
def test_every_cell_runs(notebook, tmp_path, monkeypatch):
    from conftest import _CIFAR10_DIR

    if _CIFAR10_DIR is not None:
        monkeypatch.setenv("CIFARFLOW_DATA", str(_CIFAR10_DIR))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, DEAD_PROXY)
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    here = tmp_path / "here"
    here.mkdir()
    quick = copy.deepcopy(notebook)
    parameters(quick).source = QUICK
    nbclient.NotebookClient(
        quick, timeout=240, resources={"metadata": {"path": str(here)}}
    ).execute()
    said = "".join(
        output.text
        for cell in quick.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    )
    assert said.count("test accuracy") >= 7
    drawn = [
        output
        for cell in quick.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(drawn) >= 8
    # It leaves nothing behind.
    assert list(here.iterdir()) == []
