"""Says for each library whether it is there, its version, and whether it works on this machine's GPU; one line each.

    python benchmarks/gpu/libraries.py [--device cuda|cpu]

Each is tried in its own process, all at the same time. Exit code 1 where one fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

# What a library must do, on the device; `gpu` says which. The last line that it prints is its answer.
TRIALS = {
    "torch": """
import torch
x = torch.ones(256, 256, device="cuda" if gpu else "cpu")
print(torch.__version__, torch.version.cuda, (x @ x).sum().item(), torch.cuda.get_device_name() if gpu else "")""",
    "torch.compile": """
import torch
f = torch.compile(lambda x: (x * 2).relu().sum())
print(f(torch.ones(256, device="cuda" if gpu else "cpu")).item())""",
    "torchvision": """
import torchvision
print(torchvision.__version__, torchvision.ops.nms.__name__)""",
    "cupy": """
import cupy
print(cupy.__version__, float(cupy.ones(9).sum()) if gpu else "no GPU asked for")""",
    "cucim": """
import torch
from mammostream.preprocess.backend import _cupy_backend, gpu_library_versions
backend = _cupy_backend()
print(gpu_library_versions(), float(backend.filters.threshold_otsu(backend.xp.arange(64.0).reshape(8, 8))) if gpu else "")""",
    "DALI": """
import nvidia.dali as dali
from nvidia.dali import Pipeline, fn
pipeline = Pipeline(batch_size=1, num_threads=1, device_id=0 if gpu else None)
pipeline.set_outputs(fn.random.uniform(device="gpu" if gpu else "cpu"))
pipeline.build()
pipeline.run()
print(dali.__version__)""",
    "nvImageCodec": """
import numpy
from importlib.metadata import distributions
from imagecodecs import jpeg2k_encode
from nvidia import nvimgcodec
source = numpy.arange(65536, dtype="uint16").reshape(256, 256)
host = {"device_id": nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, "backends": [nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]}
parameters = nvimgcodec.DecodeParams(color_spec=nvimgcodec.ColorSpec.UNCHANGED, allow_any_depth=True)
image = nvimgcodec.Decoder(**{} if gpu else host).decode(bytes(jpeg2k_encode(source, level=0)), params=parameters)
assert image is not None, "it decoded nothing"
print(*(d.version for d in distributions() if d.name.startswith("nvidia-nvimgcodec")), image.dtype)""",
    "imagecodecs": """
import numpy, imagecodecs
x = numpy.arange(65536, dtype="uint16").reshape(256, 256)
for name in ("zstd", "png", "jpeg2k", "htj2k", "ljpeg", "jpegls"):
    getattr(imagecodecs, name + "_encode")(x)
assert (imagecodecs.jpeg2k_decode(imagecodecs.jpeg2k_encode(x, level=0)) == x).all()
print(imagecodecs.__version__)""",
    "Triton": """
import triton
print(triton.__version__)""",
} | {
    name: f"import {name}\nprint({name}.__version__)"
    for name in ("numpy", "scipy", "skimage", "sklearn", "pandas", "pyarrow", "pydicom", "tifffile", "webdataset")
}


def main() -> None:
    """Try them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    gpu = parser.parse_args().device == "cuda"
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", f"gpu = {gpu}\n{code}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, code in TRIALS.items()
    }
    failed = False
    print(f"| library | Python {sys.version.split()[0]} |\n|---|---|")
    for name, process in running.items():
        try:
            said, _ = process.communicate(timeout=75)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            said += "\nno answer after 75 s"
        failed |= bool(process.returncode)
        answer = (said.strip().splitlines() or ["nothing"])[-1]
        print(f"| {name} | {'FAILED: ' if process.returncode else ''}{answer[:200]} |")
    sys.exit(failed)


if __name__ == "__main__":
    main()
