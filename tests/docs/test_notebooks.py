"""The notebooks run from top to bottom."""

import os

import nbclient
import nbformat
import pytest
from mains import ROOT

NOTEBOOKS = sorted((ROOT / 'docs' / 'notebooks').glob('*.ipynb'))


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
    notebook = nbformat.read(path, 4)
    pictures = images(notebook)
    assert pictures >= 2 and path.stat().st_size < 400_000
    nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3', resources={
        'metadata': {'path': str(path.parent)}}).execute()
    assert images(notebook) == pictures


def images(notebook):
    """How many pictures its outputs hold."""
    return sum(any(kind.startswith('image/') for kind in output.get('data', {}))
               for cell in notebook.cells for output in cell.get('outputs', []))
