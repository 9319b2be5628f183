"""Device, precision and processes: what ``auto`` means on this machine, and what torchrun's processes do together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from mammostream.common.errors import BadInput, Stopped
from mammostream.common.locks import hold
from mammostream.train.run.config import RuntimeConfig

_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")  # gloo, gloo, NCCL
TRAINING_LOCK, PREDICTION_LOCK = ".training.lock", ".prediction.lock"
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """The resolved device and precision, and this process among those of the run.

    Alone (`world_size` 1), what processes do together is done by one: nothing is sent, and the same code serves both.

    Attributes
    ----------
    device
        ``cpu`` or ``cuda``.
    precision
        ``fp32``, ``bf16`` or ``fp16``.
    rank, world_size
        The number of this process, and how many there are.
    """

    device: torch.device
    precision: str
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that speaks and writes files."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        """Return the autocast context of this precision; fp32 needs none."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    def scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler; only fp16's narrow range needs one, else it passes everything through."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return the model as the processes train it: its gradients are the mean of theirs. Alone, the model itself.

        Which parameters have gradients is settled here: wrap the model again when that changes.
        """
        if self.world_size == 1:
            return model
        # Batch norms' statistics are not sent about in each step: they are shared where they are used.
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device] if self.device.type == "cuda" else None, broadcast_buffers=False
        )

    def keeping_gradients(self, network: nn.Module) -> AbstractContextManager:
        """Return a context in which backward passes of what :meth:`parallel` made add up gradients and send nothing."""
        return cast(nn.parallel.DistributedDataParallel, network).no_sync() if self.world_size > 1 else nullcontext()

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of the processes' values; a tensor on the device."""
        if self.world_size > 1:
            value = value.clone()
            distributed.all_reduce(value)
        return value

    def largest(self, value: int) -> int:
        """Return the largest of the processes' values; waits for them and for the device."""
        if self.world_size == 1:
            return value
        box = torch.tensor(value, device=self.device)
        distributed.all_reduce(box, distributed.ReduceOp.MAX)
        return int(box)

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.largest(0)

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the main one's batch-norm statistics, which are those that checkpoints hold."""
        if self.world_size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def from_main(self, value: Any) -> Any:
        """Return the main process's value; the others' is ignored."""
        if self.world_size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, 0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes by rank in the main one, and an empty list in the others."""
        if self.world_size == 1:
            return [value]
        box = [None] * self.world_size if self.is_main else None
        distributed.gather_object(value, box, 0)
        return box or []

    def __str__(self) -> str:
        several = f", {self.world_size} processes" if self.world_size > 1 else ""
        return f"{self.device.type}, {self.precision}{several}"


def resolve_runtime(config: RuntimeConfig) -> Runtime:
    """Resolve ``auto`` for this machine.

    Raises
    ------
    BadInput
        ``cuda`` is asked for and there is no GPU.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise BadInput("--device cuda: torch sees no GPU; use --device cpu, or see 'mammostream doctor'")
    device = torch.device("cuda" if available and config.device != "cpu" else "cpu")
    precision = config.precision
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return Runtime(device, precision)


def make_deterministic() -> None:
    """Let torch take only algorithms that give the same bits each time; an operation that has none raises an error.

    They are slower, on a GPU: cuDNN neither tries out the fastest convolutions nor uses those that add up in any order. It
    concerns the whole process.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@contextmanager
def only_run(lock: Path, runtime: Runtime) -> Iterator[None]:
    """Hold the lock of a folder that a run writes to, in the main process; the others wait until it is held.

    Raises
    ------
    BadInput
        Another command holds it.
    """
    with hold(lock) if runtime.is_main else nullcontext():
        runtime.from_main(None)
        yield


@contextmanager
def join_processes(config: RuntimeConfig) -> Iterator[Runtime]:
    """Resolve the runtime and join the processes that torchrun started: NCCL on GPUs, one each, gloo on CPUs.

    Raises
    ------
    BadInput
        As :func:`resolve_runtime`; or there are more processes on this machine than GPUs.
    Stopped
        Another process ended while this one waited for it.
    """
    runtime = resolve_runtime(config)
    # torchrun's variables; other launchers set the same.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield runtime
        return
    device = runtime.device
    if device.type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        if local_rank >= torch.cuda.device_count():
            raise BadInput(
                f"more processes than the {torch.cuda.device_count()} GPUs of this machine; start as many: --nproc-per-node gpu"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=_store_of_this_attempt(world_size), rank=rank, world_size=world_size)
    try:
        yield replace(runtime, device=device, rank=rank, world_size=world_size)
        # They leave together: a process that left while its peer was still busy with gloo has aborted at its exit.
        distributed.barrier()
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _PEER_GONE):
            raise
        # Said only where that process had no time to say why: torchrun's processes speak once.
        raise Stopped("another process of this run ended, so this one must too; see torchrun's summary", 1) from error
    finally:
        distributed.destroy_process_group()


def _store_of_this_attempt(world_size: int) -> distributed.Store | None:
    """Return where processes that torchrun restarted find each other; None takes the launcher's own place.

    torchrun keeps one store for all attempts. Processes of a new one could find there where those of the last one listened
    (pytorch#135712), so each attempt gets names of its own. Several torchruns count their attempts each for itself: for them
    the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each attempt its own store.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or int(os.environ["LOCAL_WORLD_SIZE"]) != world_size:
        return None
    store = distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return distributed.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
