"""Where records go besides memory: a CSV file, TensorBoard, Weights & Biases."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
from fastai.learner import Learner


class CSVLog:
    """A CSV file to which frames are appended, with numbers that count on from what is in it.

    Raises:
        ValueError: there is a file with other columns.
    """

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path, self.columns, self.fits, self.steps = path, columns, 0, 0
        if path.exists() and path.stat().st_size:
            self._continue()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(columns=columns).to_csv(path, index=False)

    def _continue(self) -> None:
        found = list(pd.read_csv(self.path, nrows=0).columns)
        if found != self.columns:
            raise ValueError(f"fname={str(self.path)!r} is a file with the columns {found}: expected {self.columns}")
        old = pd.read_csv(self.path, usecols=["fit", "step"])
        if len(old):
            self.fits, self.steps = int(old["fit"].max()) + 1, int(old["step"].max()) + 1

    def write(self, frame: pd.DataFrame) -> None:
        """Append rows; they are in the file when this returns."""
        frame = frame.assign(fit=frame["fit"] + self.fits, step=frame["step"] + self.steps)
        frame[self.columns].to_csv(self.path, mode="a", header=False, index=False)


def to_tensorboard(learn: Learner, frame: pd.DataFrame, first_step: int) -> None:
    """Add rows as scalars where fastai's `TensorBoardCallback` logs, at the step at which it logs the batch's loss."""
    for cb in _callbacks(learn, "tensorboard", "TensorBoardBaseCallback"):
        if (writer := vars(cb).get("writer")) is not None:
            for record in frame.to_dict("records"):
                for tag, value in _scalars(record).items():
                    writer.add_scalar(tag, value, record["step"] - first_step + (record["phase"] == "train"))


def logs_to_wandb(learn: Learner) -> bool:
    """Whether fastai's `WandbCallback` logs this fit."""
    return bool(_callbacks(learn, "wandb", "WandbCallback"))


def to_wandb(learn: Learner, frame: pd.DataFrame) -> None:
    """Add one record's rows to the step at which fastai's `WandbCallback` has just logged the batch's loss."""
    for cb in _callbacks(learn, "wandb", "WandbCallback"):
        scalars = {tag: value for record in frame.to_dict("records") for tag, value in _scalars(record).items()}
        sys.modules["fastai.callback.wandb"].wandb.log(scalars, step=max(cb._wandb_step, 0))


def _callbacks(learn: Learner, module: str, name: str) -> list[Any]:
    """Callbacks of a kind whose module needs a package that may not be there: if not imported, there is none."""
    kind = getattr(sys.modules.get(f"fastai.callback.{module}"), name, ())
    return [cb for cb in learn.cbs if isinstance(cb, kind) and cb.run]


def _scalars(record: dict[Any, Any]) -> dict[str, float]:
    prefix = "" if record["phase"] == "train" else f"{record['phase']}_"
    known = ("fit", "epoch", "step", "phase", "layer")
    missing = {k for k in ("signal", "update", "dead_units") if record[k] != record[k]}  # what not every layer has
    return {f"activations/{record['layer']}/{prefix}{k}": v for k, v in record.items() if k not in missing.union(known)}
