"""The valid inputs: a small run of every command on two real films, and one of the films in every format."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

CLASSES = ("simulated_calcification", "bright")


def _run(line: str) -> None:
    from mammostream.demo import run_command

    run_command(shlex.split(line))


def make_run(root: Path) -> None:
    """Films, simulated copies, shards, labels, a pre-training, a fine-tuning and a prediction, by the commands."""
    import numpy as np
    import pandas as pd
    import pydicom

    from mammostream.common.real_films import film_cases
    from mammostream.preprocess.resampling import block_mean
    from mammostream.shards import open_shards

    (root / "films").mkdir(parents=True)
    for case in film_cases():
        film = pydicom.dcmread(case["lcc"])
        pixels = np.rint(block_mean(film.pixel_array, 4)).astype(np.uint16)
        film.Rows, film.Columns = pixels.shape
        film.set_pixel_data(pixels, "MONOCHROME2", 16)
        film.save_as(root / "films" / case["lcc"].name)
    small = "--device cpu --num-workers 1"
    _run(
        f"prepare --images-root {root}/films --output-dir {root}/prepared --assume-spacing 0.2 --patient-regex 'P_\\d+' "
        "--val-fraction 0.5"
    )
    _run(
        f"simulate --manifest {root}/prepared/manifest.parquet --output-dir {root}/simulated "
        "--clusters-per-image 6 --contrast 20"
    )
    _run(
        f"shards build --manifest {root}/simulated/manifest.parquet --output-dir {root}/shards --pixel-spacing 0.4 "
        "--tile-size 32 --stride 32 --device cpu --workers 1"
    )
    for split in ("train", "val"):
        path = root / f"{split}.csv"
        _run(f"shards labels {root}/shards --split {split} --findings {root}/simulated/findings.parquet --output {path}")
        labels = pd.read_csv(path)
        tiles = open_shards(root / "shards").tiles(split).set_index("key").loc[labels["tile_path"]]
        labels["bright"] = (tiles["mean_intensity"] > tiles["mean_intensity"].median()).astype(int).to_numpy()
        labels.to_csv(path, index=False)
    _run(
        f"pretrain --shards {root}/shards --output-dir {root}/pretrain --arch resnet18_narrow --hidden-dim 32 --proj-dim 16 "
        f"--batch-size 16 --epochs 3 {small} --wandb-mode disabled"
    )
    _run(
        f"finetune --byol-checkpoint {root}/pretrain/mammogram_byol_final.pth --train-csv {root}/train.csv --val-csv "
        f"{root}/val.csv --shards {root}/shards --class-names {' '.join(CLASSES)} --batch-size 16 --output-dir {root}/finetune "
        f"--epochs 2 {small} --wandb-mode disabled"
    )


def complete(root: Path) -> None:
    """Add to a run what the targets damage besides: a prediction, tables as CSV and JSON, a film in every format."""
    import pandas as pd

    _run(
        f"infer --model-path {root}/finetune/final_classification_model.pth --shards {root}/shards --split val --device cpu "
        f"--num-workers 1 --output-dir {root}/infer --sheet-tiles 0"
    )
    predictions = pd.read_parquet(root / "infer/predictions.parquet")
    predictions.to_csv(root / "predictions.csv", index=False)
    predictions.to_json(root / "predictions.json", orient="records")
    pd.concat([pd.read_csv(root / f"{split}.csv") for split in ("train", "val")]).to_csv(root / "both.csv", index=False)
    manifest = pd.read_parquet(root / "prepared/manifest.parquet")
    absolute = [str((root / "prepared" / path).resolve()) for path in manifest["path"]]
    manifest.assign(path=absolute).to_parquet(root / "manifest.parquet", index=False)
    simulated = pd.read_parquet(root / "simulated/manifest.parquet")
    simulated["label:simulated_calcification"], simulated["label:bright"] = 1, [0, 1]
    simulated.to_parquet(root / "film_labels.parquet", index=False)
    table = manifest[["image_id", "patient_id", "laterality", "view", "split"]].assign(pixel_spacing_mm=0.2, malignant=[0, 1])
    table.to_csv(root / "films.csv", index=False)
    write_films(root / "films/1-280.dcm", root / "films_small")


def write_films(source: Path, folder: Path) -> None:
    """Write one film at 0.4 mm in every format and transfer syntax of :data:`targets.FILMS`."""
    import imagecodecs
    import numpy as np
    import pydicom
    import tifffile

    from mammostream.preprocess.resampling import block_mean

    folder.mkdir()
    original = pydicom.dcmread(source)
    pixels = np.rint(block_mean(original.pixel_array, 2) / 16).astype(np.uint16)  # 12 bits
    bytes8 = (pixels >> 4).astype(np.uint8)
    _dicom(original, folder / "explicit.dcm", "1.2.840.10008.1.2.1", pixels, pixels.tobytes())
    _dicom(original, folder / "implicit.dcm", "1.2.840.10008.1.2", pixels, pixels.tobytes())
    _dicom(original, folder / "deflated.dcm", "1.2.840.10008.1.2.1.99", pixels, pixels.tobytes())
    _dicom(original, folder / "big_endian.dcm", "1.2.840.10008.1.2.2", pixels, pixels.astype(">u2").tobytes())
    streams = {
        "jpeg_ls": ("1.2.840.10008.1.2.4.80", pixels, imagecodecs.jpegls_encode(pixels)),
        "jpeg2000": (
            "1.2.840.10008.1.2.4.90",
            pixels,
            imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", bitspersample=12, reversible=True),
        ),
        "lossless": ("1.2.840.10008.1.2.4.70", pixels, imagecodecs.ljpeg_encode(pixels, bitspersample=12)),
        "baseline": ("1.2.840.10008.1.2.4.50", bytes8, imagecodecs.jpeg8_encode(bytes8, level=95)),
    }
    for name, (syntax, values, stream) in streams.items():
        _dicom(original, folder / f"{name}.dcm", syntax, values, pydicom.encaps.encapsulate([bytes(stream)]))
    rle = pydicom.dcmread(folder / "explicit.dcm")
    rle.compress("1.2.840.10008.1.2.5")
    rle.save_as(folder / "rle.dcm")
    (folder / "film.png").write_bytes(imagecodecs.png_encode(pixels << 4))
    (folder / "film.jpg").write_bytes(imagecodecs.jpeg8_encode(bytes8, level=95))
    (folder / "film.jp2").write_bytes(imagecodecs.jpeg2k_encode(pixels << 4, reversible=True))
    (folder / "film.pgm").write_bytes(b"P5\n%d %d\n65535\n" % pixels.shape[::-1] + (pixels << 4).astype(">u2").tobytes())
    tifffile.imwrite(folder / "film.tif", pixels << 4, photometric="minisblack")
    tifffile.imwrite(folder / "zstd.tif", pixels << 4, photometric="minisblack", compression="zstd")


def _dicom(original: Any, path: Path, syntax: str, pixels: Any, data: bytes) -> None:
    import copy

    film = copy.deepcopy(original)
    film.file_meta.TransferSyntaxUID = syntax
    film.Rows, film.Columns = pixels.shape
    bits = 8 * pixels.dtype.itemsize
    film.BitsAllocated, film.BitsStored, film.HighBit = bits, min(bits, 12), min(bits, 12) - 1
    film.WindowCenter, film.WindowWidth = (128, 256) if bits == 8 else (2048, 4096)
    film.ImagerPixelSpacing = [0.4, 0.4]
    film.PixelData = data + b"\0" * (len(data) % 2)
    film["PixelData"].VR = "OB" if bits == 8 or "4." in syntax[-5:] else "OW"
    film["PixelData"].is_undefined_length = "1.2.4." in syntax
    film._read_little, film._read_implicit = None, None
    import pydicom

    little, implicit = not syntax.endswith("1.2.2"), syntax == "1.2.840.10008.1.2"
    pydicom.dcmwrite(path, film, enforce_file_format=True, implicit_vr=implicit, little_endian=little)
