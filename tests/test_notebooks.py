"""The notebooks run in a fresh kernel, and are committed with their outputs."""

import os
from pathlib import Path

import cases
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# The others are for make test-slow.
few = pytest.mark.parametrize(
    "path",
    cases.named({path.stem: path for path in NOTEBOOKS}, "quickstart"),
)


def environment():
    """What a kernel inherits: no virtual devices, and no backend that shows nothing."""
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    inherited = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    return inherited | {"XLA_FLAGS": " ".join(flags)}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    """What a cell displays: names of streams and MIME types, in order."""
    kinds = []
    for output in cell.outputs:
        assert output.output_type != "error", output.evalue
        kind = output.get("name") or ", ".join(sorted(output.data))
        if kinds[-1:] != [kind]:
            kinds.append(kind)
    return kinds


@few
def test_it_runs_and_shows_what_is_committed(path, tmp_path):
    committed = nbformat.read(path, as_version=4)
    executed = nbformat.from_dict(committed)
    for cell in code_cells(executed):
        cell.outputs = []
    NotebookClient(
        executed,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},
    ).execute(env=environment() | {"IPYTHONDIR": str(tmp_path)})
    # Here a library may warn, of this machine or of what is new in it.
    expected = [
        [kind for kind in shown(cell) if kind != "stderr"]
        for cell in code_cells(executed)
    ]
    assert [shown(cell) for cell in code_cells(committed)] == expected


@every
def test_it_is_committed_as_executed_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert not any("stderr" in shown(cell) for cell in cells)  # no warnings
    assert path.stat().st_size < 400_000
