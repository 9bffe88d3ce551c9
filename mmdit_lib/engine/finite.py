"""The search for NaN and infinity in what a step reads and returns."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch

from .schedule import place_in

log = logging.getLogger("mmdit_lib")


class Answer(NamedTuple):
    """Which tensors of a step are finite, on its way to the CPU.

    Attributes:
        names: of the tensors.
        finite: [tensors], bool, on the CPU.
        copied: when `finite` is valid; None if it is from the start.
    """

    names: list[str]
    finite: torch.Tensor
    copied: torch.cuda.Event | None

    def not_finite(self) -> list[str]:
        if self.copied:
            self.copied.synchronize()
        return [name for name, fine in zip(self.names, self.finite.tolist(), strict=True) if not fine]


class FiniteCheck:
    """Finds tensors with NaN or infinity.

    Args:
        late: answer one step late, while the next step runs, if steps follow each other as in an image. A GPU would be
            idle otherwise, from the transfer of the answer until the CPU has launched the next step. The last step of
            a schedule is never late. If an image ends before its schedule does, its last answer becomes a warning in
            the log.
    """

    def __init__(self, late: bool):
        self.late = late
        self._timesteps: torch.Tensor | None = None
        self._place = -1
        self._open: Answer | None = None

    def __call__(
        self, tensors: Mapping[str, torch.Tensor], timestep: torch.Tensor, timesteps: torch.Tensor | None
    ) -> list[str]:
        """Names of such tensors, of this step or the one before.

        Args:
            timestep: of each row, as the step was given it.
            timesteps: of all steps, if they are known.
        """
        finite = torch.stack([x.isfinite().all() for x in tensors.values()])
        place = place_in(timestep, timesteps) if self.late and timesteps is not None else None
        before, self._open = self._open, None
        moved = place - self._place if place is not None and timesteps is self._timesteps else None
        if before and (bad := before.not_finite()):
            if moved in (0, 1):  # 0: a second call in a step, as for skip-layer guidance
                return bad
            log.warning("%s of an image that was not finished: NaN or infinity", " and ".join(bad))
        starts = place == 0 and (moved is None or self._place == len(timesteps) - 1)
        self._timesteps, self._place = (None, -1) if place is None else (timesteps, place)
        if place is not None and (moved == 1 or starts) and place < len(timesteps) - 1:
            self._open = sent(list(tensors), finite)
            return []
        return Answer(list(tensors), finite, None).not_finite()


def sent(names: list[str], finite: torch.Tensor) -> Answer:
    """Without waiting for a transfer from a GPU."""
    if not finite.is_cuda:
        return Answer(names, finite, None)
    with torch.cuda.device(finite.device):
        copy, copied = finite.to("cpu", non_blocking=True), torch.cuda.Event()
        copied.record()
    return Answer(names, copy, copied)
