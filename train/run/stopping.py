"""Being told to stop: by a cluster that wants its machine back, by a time limit, or by Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from mammostream.train.run.runtime import Runtime

_EXIT_CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
_AGREE_EVERY = 10  # steps, on a GPU: there agreeing waits for the device


class StopSignals:
    """Turns SIGTERM, SIGUSR1 (SLURM's warnings before it kills) and Ctrl-C into a question that the loop asks after a step.

    A second Ctrl-C stops at once (KeyboardInterrupt); a second SIGTERM or SIGUSR1 changes nothing, since schedulers send them
    more than once. Outside the ``with`` block the signals do what they did before.

    Parameters
    ----------
    speaks
        Whether to say on stderr that the signal was heard.

    Examples
    --------
    >>> import os, signal, torch
    >>> from mammostream.train.run.runtime import Runtime
    >>> with StopSignals() as signals:
    ...     os.kill(os.getpid(), signal.SIGUSR1)
    ...     signals.exit_code(Runtime(torch.device("cpu"), "fp32"), step=1)
    75
    """

    def __init__(self, speaks: bool = True) -> None:
        self._speaks = speaks
        self._code = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self._before = {number: signal.signal(number, self._note) for number in _EXIT_CODES}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def exit_code(self, runtime: Runtime, step: int) -> int:
        """Return the exit code to stop with after `step`, or 0 to go on; the same in all processes.

        A signal may reach one process only: so they agree, after each step on CPUs and after every tenth on GPUs.
        """
        if runtime.world_size > 1 and runtime.device.type == "cuda" and step % _AGREE_EVERY:
            return 0
        return runtime.largest(self._code)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._code == _EXIT_CODES[signal.SIGINT]:
            raise KeyboardInterrupt
        if self._speaks and not self._code:
            # Not print(): a signal may come in the midst of one.
            os.write(2, b"\nstopping after this step\n")
        self._code = max(self._code, _EXIT_CODES[signal.Signals(number)])
