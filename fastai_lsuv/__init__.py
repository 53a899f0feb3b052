"""Data-driven initialisation (LSUV) for fastai and PyTorch.

Two stories of the same shape, and what they are built on; imports run downwards only:

    demo         digits, with LSUV and without: `python -m fastai_lsuv`
    callback     when LSUV runs in fastai: `LSUVCallback`, `learn.lsuv_init`
    recorder     when activations are recorded: `ActivationStatsRecorder`
    recording/   samples of outputs, what they show, its history, verdicts, logs
    learner/     what needs a Learner: its first batch, how it calls the model, what must not be touched
    core/        the algorithm, on PyTorch alone: `lsuv_`
    report       what was measured and done: rows, table, frame, verdict
    plots/       frames in, figures out
    init         initialisers for very deep networks

In core/, from `lsuv` down: `lsuv_` discovers the layers in a first pass (`discovery`, `probe`), corrects each as it
runs in a second (`correction`: `exact` in one step; `blocks` and `shared` layers `iterated`), and measures in a third.
All passes are dry runs (`dry_run`) of copies of the model (`copies`).
"""

import sys
import warnings

if sys.argv[:1] == ["-m"] and __name__ in sys.orig_argv:  # `python -m fastai_lsuv`: the process is the demo's
    warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # while fastai is imported

from fastai_lsuv.callback import LSUVCallback
from fastai_lsuv.core.lsuv import lsuv_
from fastai_lsuv.recorder import ActivationStatsRecorder
from fastai_lsuv.report import LSUVReport

__version__ = "0.1.0"
__all__ = ["ActivationStatsRecorder", "LSUVCallback", "LSUVReport", "lsuv_"]
