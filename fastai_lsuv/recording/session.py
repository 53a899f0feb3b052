"""One fit that is recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastai_lsuv.recording.budget import Budget
from fastai_lsuv.recording.capture import Capture
from fastai_lsuv.recording.device_buffer import DeviceBuffer


class Where(NamedTuple):
    """A batch's place in the training."""

    fit: int  # from 0
    epoch: int  # of the fit
    step: int  # training batches before it, over all fits
    phase: str  # train, valid


@dataclass
class Session:
    """What is known of a fit while it lasts: let go of it, and there is no tensor and no hook any more."""

    fit: int  # its number
    first_step: int
    names: list[str]  # of the layers
    places: list[int]  # of these in the history
    capture: Capture
    budget: Budget  # for `every="auto"`
    device_buffer: DeviceBuffer[Where] = field(default_factory=DeviceBuffer)
    at: Where | None = None  # the batch at hand
    epoch: int = -1  # of the last training batch
    is_watched: bool = False  # it is to be recorded
    loss: Tensor | None = None  # as it was before it was scaled for mixed precision
    scale: Tensor | float = 1.0  # by how much it was
    is_stopped: bool = False  # by `stop_on`
    n_batches: int = 0
    n_begun: int = 0
    n_watched: int = 0
    n_recorded: int = 0

    def begin(self, at: Where, watch: bool) -> None:
        """Begin a batch."""
        self.at, self.is_watched, self.loss, self.scale = at, watch, None, 1.0
        self.n_begun += 1
        self.n_watched += watch
        if at.phase == "train" and at.epoch != self.epoch:
            self.epoch = at.epoch
            self.capture.units.new_epoch()
        if watch:
            self.capture.watch(at.phase == "train")

    def note_loss(self, loss: object) -> None:
        """Remember the loss as it is before mixed precision scales it, if there is one."""
        if self.is_watched:
            self.capture.see_loss(loss)
        if self.is_watched and self.capture.with_grad and _is_number(loss):
            self.loss = _plain(loss).clone()

    def note_scaled(self, loss: object) -> None:
        """Find by how much it was scaled."""
        if self.loss is not None and _is_number(loss):
            self.scale = torch.where(self.loss == 0, 1.0, _plain(loss) / self.loss)
        self.loss = None

    def end(self, near_zero: float, with_hist: bool) -> None:
        """Keep what the batch showed, if the model ran in it."""
        if self.at is not None and self.is_watched and not self.capture.outputs.empty:
            self.device_buffer.add(self.at, self.capture.statistics(near_zero, with_hist, self.scale))
            self.n_recorded += 1
        self.at, self.is_watched = None, False

    def complaint(self) -> str:
        """What the user should know about what could not be recorded; empty if all was."""
        if self.n_batches and not self.n_recorded and (self.n_watched or not self.n_begun):
            return f"none of {self.n_batches} batches was recorded: no layer ran between before_batch and after_pred"
        if self.capture.failed:
            (first, why), *others = ((self.names[i], why) for i, why in self.capture.failed.items())
            more = f" and {len(others)} more" if others else ""
            return f"could not be recorded: {first}{more} ({why})"
        return ""


def _is_number(loss: object) -> bool:
    return isinstance(loss, Tensor) and loss.numel() == 1


def _plain(loss: object) -> Tensor:
    """Without its graph and without fastai's type."""
    assert isinstance(loss, Tensor)
    return loss.detach().as_subclass(Tensor)
