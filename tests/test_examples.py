"""The examples run as they are."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples/segmentation_and_tiling.ipynb"


@pytest.fixture
def kernel_at_home_here(monkeypatch, tmp_path):
    """Jupyter and IPython keep to a temporary folder; the kernel sees this checkout."""
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


@pytest.mark.usefixtures("kernel_at_home_here")
def test_notebook():
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before you commit"
    # What the text claims, asked of the notebook's own variables.
    claims = f"""
import sys
from mammostream import preprocess
assert sys.executable == {sys.executable!r}
assert preprocess.__file__.startswith({str(ROOT)!r}), preprocess.__file__
assert segmentation.side == film.segmentation.side == "R"
assert header.spacing_mm is None and not film.flags
assert len(boxes) == 4 and len(clusters) >= 4
counts = film.selection.counts
assert counts["kept_rescue"] >= 1 and counts["clusters_unheld"] == 0
assert all(((film.tiles.x <= a) & (film.tiles.y <= b) & (film.tiles.x + 512 >= c) & (film.tiles.y + 512 >= d)).any()
           for a, b, c, d in boxes)
assert tile.shape == (512, 512) and tile.dtype == np.uint16 and np.unique(tile).size > 1000
assert any(x <= a and y <= b and c <= x + size and d <= y + size for a, b, c, d in boxes)
"""
    notebook.cells.append(nbformat.v4.new_code_cell(claims))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) == 5
