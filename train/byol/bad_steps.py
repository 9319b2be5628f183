"""Steps whose gradients were not finite: which they were, and the tiles that were in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mammostream.common.errors import BadInput
from mammostream.common.files import writing
from mammostream.train.run.runtime import Runtime


class BadSteps:
    """Counts bad steps without waiting for the device, writes their tiles to a file, and ends a run that has too many.

    A step only notes its gradients' norm, a tensor on the device; :meth:`read` looks at those noted since. All processes call
    both alike: a step is bad in all of them or in none, since their gradients are the same.

    Parameters
    ----------
    path
        A line of JSON for each bad step: ``step``, and ``tiles``, the numbers of the tiles of all processes.
    limit
        Steps in a row that end the run.
    runtime
        The processes.

    Attributes
    ----------
    total
        Bad steps of the run so far, as far as they were read.
    path
        As given.
    """

    def __init__(self, path: Path, limit: int, runtime: Runtime) -> None:
        self.total = 0
        self.path = path
        self._limit = limit
        self._runtime = runtime
        self._row = 0  # bad steps in a row
        self._pending: list[tuple[int, Tensor, Sequence[Tensor]]] = []

    @property
    def ongoing(self) -> bool:
        """Whether the last step that was read was bad."""
        return self._row > 0

    def note(self, step: int, norm: Tensor, numbers: Sequence[Tensor]) -> None:
        """Take the norm of a step's gradients, a scalar on the device, and the numbers of this process's tiles in it."""
        self._pending.append((step, norm, numbers))

    def read(self) -> None:
        """Look at the steps noted since the last time; waits for the device.

        Raises
        ------
        BadInput
            Too many in a row, or the file cannot be written.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        bad_ones = ~np.isfinite(torch.stack([norm for _, norm, _ in pending]).tolist())
        for (step, _, numbers), bad in zip(pending, bad_ones, strict=True):
            self._row = self._row + 1 if bad else 0
            if bad:
                self.total += 1
                self._write(step, numbers)
            if self._row >= self._limit:
                raise BadInput(
                    f"the gradients of {self._row} steps in a row, up to step {step}, were not finite; lower --lr, use "
                    f"--precision fp32, or look at their tiles, whose numbers stand in {self.path}"
                )

    def _write(self, step: int, numbers: Sequence[Tensor]) -> None:
        tiles = self._runtime.gather(torch.cat(list(numbers)).tolist())
        if self._runtime.is_main:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "tiles": [number for part in tiles for number in part]}) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, for a checkpoint; call :meth:`read` before."""
        return {"total": self.total, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting where :meth:`state_dict` was taken."""
        self.total, self._row = state["total"], state["row"]


class KeptStatistics:
    """The batch norms' running statistics, which a bad step must leave as they were.

    Once NaN, they would be NaN forever. A handful of kernels for all of them together, and nothing waits for the device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._kept: Tensor | None = None

    def keep(self) -> None:
        """Remember them as they are, before a step's forward pass."""
        self._kept = self._flat()

    def restore(self, bad: Tensor) -> None:
        """Put them back where `bad`, a bool scalar on the device, says so."""
        assert self._kept is not None
        chosen = torch.where(bad, self._kept, self._flat())
        parts = chosen.split([buffer.numel() for buffer in self._buffers])
        torch._foreach_copy_(self._buffers, [p.view_as(b) for p, b in zip(parts, self._buffers, strict=True)])

    def _flat(self) -> Tensor:
        return torch.cat([buffer.flatten() for buffer in self._buffers])
