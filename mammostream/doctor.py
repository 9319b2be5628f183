"""``mammostream doctor``: what this machine has and what will be used."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from typing import Any

import click

from mammostream.common.options import Command
from mammostream.common.surroundings import describe_surroundings

PACKAGES = (
    "torch",
    "torchvision",
    "nvidia-dali",
    "cupy",
    "cucim",
    "webdataset",
    "numpy",
    "scikit-image",
    "pydicom",
    "imagecodecs",
    "wandb",
)


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def doctor(as_json: bool) -> None:
    """Show what this machine has (CPU, memory, disk, GPU, packages) and what each stage will use.

    Exit code 0 if everything needed is there, 2 if a stage cannot run; its line says what to install.
    """
    facts = examine()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        for section, lines in facts.items():
            click.echo(section)
            for name, value in lines.items():
                click.echo(f"  {name:<22} {value}")
    if any(str(value).startswith("missing") for value in facts["will be used"].values()):
        sys.exit(2)


def examine() -> dict[str, dict[str, Any]]:
    """Return what the machine has and what will be used: section -> name -> value."""
    return {
        "machine": {
            "python": platform.python_version(),
            "cores": len(os.sched_getaffinity(0)),
            "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
            "free disk here": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB",
            **describe_surroundings(),
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "will be used": {
            "segment and score": _preprocess(),
            "decode and augment": _dali(),
            "train and predict": _torch(),
        },
    }


def _version(name: str) -> str:
    """Return the version of a package whose name may have a CUDA suffix (cupy-cuda12x, cucim-cu12)."""
    found = [d for d in importlib.metadata.distributions() if _plain(d.metadata["Name"]) == name]
    return f"{found[0].version} ({found[0].metadata['Name']})" if found else "not installed"


def _plain(name: str) -> str:
    for suffix in ("-cuda12x", "-cuda13x", "-cuda120", "-cuda130", "-cu12", "-cu13"):
        name = name.removesuffix(suffix)
    return name.lower()


def _preprocess() -> str:
    from mammostream.shards.build.plan import resolve_device

    if resolve_device("auto") == "cuda":
        return "GPU: CuPy and cuCIM"
    return "CPU: NumPy and scikit-image (CuPy sees no GPU)"


def _torch() -> str:
    try:
        import torch
    except ImportError:
        return "missing: torch; install mammostream[cuda12] or mammostream[cuda13]"
    if not torch.cuda.is_available():
        return "CPU, fp32 (torch sees no GPU)"
    properties = torch.cuda.get_device_properties(0)
    precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {precision}, compiled"


def _dali() -> str:
    try:
        from nvidia.dali import Pipeline, fn, types
    except ImportError:
        return "missing: nvidia-dali; install mammostream[cuda12] or mammostream[cuda13]"
    try:
        import torch

        gpu = torch.cuda.is_available()
    except ImportError:
        gpu = False
    # A graph that runs is better evidence than an import.
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=0 if gpu else None)
    pipeline.set_outputs(fn.constant(idata=1, dtype=types.INT32, device="gpu" if gpu else "cpu"))  # type: ignore[attr-defined]  # operators are made at run time
    pipeline.build()
    pipeline.run()
    return f"{'GPU' if gpu else 'CPU'}: DALI (a test graph ran there)"
