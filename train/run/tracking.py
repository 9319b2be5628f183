"""Metrics of a run: always a line of JSON each, and Weights & Biases where it is wanted and works."""

from __future__ import annotations

import json
import math
import numbers
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mammostream.common.errors import BadInput, first_line
from mammostream.common.files import write_text, write_yaml, writing

MODES = ("auto", "online", "offline", "disabled")


class Tracker:
    """Writes ``metrics.jsonl`` and logs the same numbers to Weights & Biases (wandb).

    The file is the record: it is flushed at every line and needs no service. wandb is a view of it: where it fails,
    a warning says so and the run continues.

    Parameters
    ----------
    run_dir
        The run's directory, made if missing; ``config.yaml`` and wandb's files go there too.
    project
        wandb's project; None is ``mammostream``.
    mode
        ``auto`` does as ``WANDB_MODE`` says, else is online where wandb finds a key (``WANDB_API_KEY``, netrc) and
        offline elsewhere; ``online`` falls back to offline where wandb cannot be reached; ``disabled`` does not even
        import wandb.
    config
        The run's resolved options as plain types, for ``config.yaml`` and wandb.
    run_name
        wandb's name of the run; None is the directory's name.
    resume_step
        The step that a resumed run restarts from: lines of later steps are dropped, since they will come again. wandb
        continues the same run. None starts a run: the lines of an earlier one in that directory go.

    Raises
    ------
    BadInput
        The mode is unknown or the directory cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from mammostream.train.run.tracking import Tracker
    >>> with tempfile.TemporaryDirectory() as folder, Tracker(folder, None, "disabled", {}) as tracker:
    ...     tracker.log(10, {"loss": -0.5, "val": {"auc": float("nan")}})
    ...     print(tracker.path.read_text(), end="")
    {"step": 10, "loss": -0.5, "val/auc": null}
    """

    def __init__(
        self,
        run_dir: str | Path,
        project: str | None,
        mode: str,
        config: Mapping[str, Any],
        run_name: str | None = None,
        resume_step: int | None = None,
    ) -> None:
        if mode not in MODES:
            raise BadInput(f"unknown wandb mode '{mode}'; known: {', '.join(MODES)}")
        run_dir = Path(run_dir)
        self.path = run_dir / "metrics.jsonl"
        if resume_step is not None:
            drop_lines(self.path, resume_step)
        write_yaml(run_dir / "config.yaml", dict(config))
        try:
            self._file = self.path.open("w" if resume_step is None else "a", encoding="utf-8")
        except OSError as error:
            raise BadInput(f"cannot write {self.path}: {error.strerror}; choose another output directory") from error
        self._run = None
        if mode == "auto" and os.environ.get("WANDB_MODE") in MODES[1:]:
            mode = os.environ["WANDB_MODE"]
        if mode != "disabled":
            self._run = _start_wandb(run_dir, project, mode, config, run_name, resume_step is not None)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the numbers of a step.

        Parameters
        ----------
        step
            The optimiser step. wandb ignores a step below the last one logged; the file takes any.
        metrics
            Name -> number (a tensor of one element too: reading it waits for the GPU). Nested dicts are flattened
            with ``/``. What is not a finite number becomes None; ``step`` is taken and ignored.
        """
        numbers_by_name = _flatten(metrics)
        line = {"step": int(step)} | numbers_by_name | {"step": int(step)}
        with writing(self.path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if self._run is not None:
            try:
                self._run.log({k: v for k, v in numbers_by_name.items() if v is not None}, step=int(step))
            except Exception as error:
                self._give_up(error)

    def close(self, exit_code: int = 0) -> None:
        """Close the file and end the wandb run; `exit_code` other than 0 marks it as failed. Twice is once."""
        with writing(self.path):
            self._file.close()
        run, self._run = self._run, None
        if run is not None:
            try:
                run.finish(exit_code=exit_code)
            except Exception as error:
                self._give_up(error)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(exit_code=0 if kind is None else getattr(error, "exit_code", 1))

    def _give_up(self, error: Exception) -> None:
        """Go on without wandb: hours of training are worth more than its curves."""
        self._run = None
        warnings.warn(f"wandb stopped ({first_line(error)}); {self.path} has all metrics", stacklevel=3)


def _start_wandb(
    run_dir: Path, project: str | None, mode: str, config: Mapping[str, Any], run_name: str | None, resumed: bool
) -> Any:
    """Start a wandb run, offline where online fails; None, after a warning, where that fails too."""
    id_file = run_dir / "wandb_run_id.txt"
    known_id = id_file.read_text(encoding="utf-8").strip() if resumed and id_file.is_file() else None
    try:
        import wandb

        if mode == "auto":
            mode = "online" if _has_key(wandb) else "offline"
    except Exception as error:
        warnings.warn(f"wandb did not start ({first_line(error)}); metrics.jsonl has all metrics", stacklevel=3)
        return None
    attempts: list[Any] = [*dict.fromkeys((mode, "offline"))]
    for attempt in attempts:  # compute nodes often have a key but no network
        try:
            run = wandb.init(
                project=project or "mammostream",
                name=run_name or run_dir.resolve().name,
                config=dict(config),
                dir=run_dir,
                mode=attempt,
                id=known_id,
                resume="allow" if known_id and attempt == "online" else None,
            )
            write_text(id_file, run.id + "\n")
            return run
        except Exception as error:
            then = "going on offline" if attempt == "online" else "metrics.jsonl has all metrics"
            warnings.warn(f"wandb did not start {attempt} ({first_line(error)}); {then}", stacklevel=3)
    return None


def _has_key(wandb: Any) -> bool:
    """Say whether wandb finds a key, without asking for one and without the network."""
    try:
        return wandb.login(prompt=False, verify=False)
    except TypeError:  # wandb before login() had `prompt`
        return bool(wandb.api.api_key)


def drop_lines(path: Path, resume_step: int) -> None:
    """Rewrite a file of JSON lines without a torn last one (its writer was killed) and without steps after `resume_step`."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _is_wanted(line, resume_step)]
    if kept != lines:
        write_text(path, "".join(kept))


def _is_wanted(line: str, resume_step: int) -> bool:
    if not line.endswith("\n"):
        return False
    try:
        return json.loads(line)["step"] <= resume_step
    except (ValueError, TypeError, KeyError):
        return False


def _flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | None]:
    """Return name -> finite number or None, with nested names joined by ``/``."""
    flat: dict[str, int | float | None] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = _finite(value)
    return flat


def _finite(value: Any) -> int | float | None:
    """Return a number as int or float, or None for what is not a finite number."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, (str, bytes)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of many elements
        return None
    return number if math.isfinite(number) else None
