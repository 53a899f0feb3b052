"""Data-driven initialisation (LSUV) for fastai and PyTorch."""

from fastai_lsuv.callback import LSUVCallback
from fastai_lsuv.lsuv import lsuv_
from fastai_lsuv.report import LSUVReport

__version__ = "0.1.0"
__all__ = ["LSUVCallback", "LSUVReport", "lsuv_"]
