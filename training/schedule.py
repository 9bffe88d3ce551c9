"""Shared by the training stages: a budget of time or steps, the learning rate and a log of losses."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Budget:
    """Iterates over (step, progress 0..1) until `minutes` or `steps` are used up, whichever comes first."""

    minutes: float
    steps: int | None = None
    """No limit on steps if None."""
    step: int = 0
    """Steps done so far; above 0 in a resumed run, so that the learning rate continues from its last value."""
    seconds: float = 0.0
    """Time used so far, resumed runs included."""

    def __iter__(self) -> Iterator[tuple[int, float]]:
        start = time.monotonic() - self.seconds
        while (progress := self._progress()) < 1:
            yield self.step, progress
            self.step += 1
            self.seconds = time.monotonic() - start

    def _progress(self) -> float:
        if self.minutes == 0 or self.steps == 0:
            return 1.0
        return max(self.seconds / (60 * self.minutes), self.step / self.steps if self.steps else 0.0)

    @property
    def is_spent(self) -> bool:
        """Whether the minutes or the steps are used up."""
        return self._progress() >= 1


def learning_rate(step: int, progress: float, warmup: int) -> float:
    """Fraction of the peak learning rate: cosine decay to 1%, with linear warm-up over the first `warmup` steps."""
    return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


@dataclass
class Log:
    """Losses, averaged over every `every` steps."""

    every: int = 50
    rows: list[list] = field(default_factory=list)
    """[stage, step, seconds since the stage started, mean loss]."""
    _recent: list[Tensor] = field(default_factory=list)
    _started: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, step: int, loss: Tensor) -> None:
        """Record one step's loss; prints every tenth row."""
        start = self._started.setdefault(stage, time.monotonic())
        self._recent.append(loss.detach())  # on the device: synchronizes only every `every` steps
        if (step + 1) % self.every == 0:
            seconds = time.monotonic() - start
            mean = torch.stack(self._recent).mean().item()
            self.rows.append([stage, step + 1, round(seconds, 1), round(mean, 5)])
            self._recent.clear()
            if (step + 1) % (10 * self.every) == 0:
                print("{} step {} after {} s: loss {}".format(*self.rows[-1]), flush=True)
