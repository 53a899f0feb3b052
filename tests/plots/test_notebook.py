"""Figures in a notebook: each call shows its figure, once, wherever it stands in a cell."""

import IPython.core.completer  # noqa: F401  (adds a warnings filter as it is imported, as a client may do later)
import nbformat
from nbclient import NotebookClient

SETUP = """
import matplotlib.pyplot as plt
from fastai.basics import Learner
from fastai_lsuv import ActivationStatsRecorder, LSUVCallback
from fastai_lsuv.demo import digits_dls, plain_cnn
recorder = ActivationStatsRecorder(with_hist=True)
learn = Learner(digits_dls(), plain_cnn(5), cbs=[LSUVCallback(verbose=False), recorder])
with learn.no_bar(), learn.no_logging():
    learn.fit(1)
"""
CELLS = {
    "recorder.plot_stats(); recorder.dead_chart(); recorder.color_dim()": 3,
    "recorder.plot_stats()": 1,
    "figure = recorder.plot_layer_stats(0)": 1,
    "figure": 1,  # once more, of an earlier cell
    "learn.lsuv_report.plot(); 0": 1,
    "learn.lsuv_report.plot()": 1,
    "fig, ax = plt.subplots(); recorder.color_dim(0, ax=ax)": 1,
}


def test_each_figure_is_shown_once():
    cells = [nbformat.v4.new_code_cell(code) for code in (SETUP, *CELLS)]
    notebook = NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=300).execute()
    shown = [sum("image/png" in o.get("data", {}) for o in cell.outputs) for cell in notebook.cells[1:]]
    assert dict(zip(CELLS, shown, strict=True)) == CELLS
