"""Manifests and built shard directories of small real films."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import mammostream
from mammostream.preprocess.reading import read_header
from mammostream.shards.build.build import build_all
from mammostream.shards.build.launch import Launcher
from mammostream.shards.build.merge import finish
from mammostream.shards.build.plan import BuildConfig, BuildPlan, make_plan
from mammostream.shards.manifest import read_manifest, write_manifest
from mammostream.shards.reading import ShardSet, open_shards

SPACING = 0.4  # of `cropped_films`
# 358 x 570 pixels a film give a few dozen tiles each.
CONFIG = BuildConfig(tile_size=64, stride=48, images_per_shard=2, device="cpu")


def manifest_frame(folder: Path) -> pd.DataFrame:
    """Return a manifest of ``<patient>_<view>`` files: P0 trains, P1 validates."""
    rows = []
    for path in sorted(folder.iterdir()):
        patient, view = path.stem.split("_")[:2]
        rows.append(
            {
                "image_id": path.stem,
                "path": str(path),
                "patient_id": patient,
                "study_id": "",
                "laterality": view[0].upper(),
                "view": view[1:].upper(),
                "split": "train" if patient == "P0" else "val",
                "pixel_spacing_mm": SPACING,
                "spacing_source": "assumed",
                "bits": read_header(path).bits,
            }
        )
    return pd.DataFrame(rows)


@pytest.fixture(scope="session")
def write_dicom() -> Callable[..., Path]:
    """Return a function that writes a (H, W) array as DICOM, making folders on the way; None writes no pixels."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

    def write(path: Path, pixels: np.ndarray | None, rle: bool = False, **elements: Any) -> Path:
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.2"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
        bits = 16 if pixels is None else 8 * pixels.dtype.itemsize
        dataset.Rows, dataset.Columns = (60, 40) if pixels is None else pixels.shape
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
        dataset.PixelRepresentation, dataset.SamplesPerPixel = 0, 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        if pixels is not None:
            dataset.PixelData = pixels.tobytes()
        for name, value in elements.items():
            setattr(dataset, name, value)
        if rle:
            dataset.compress(RLELossless)
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=True)
        return path

    return write


@pytest.fixture
def call(monkeypatch, capfd):
    """Return a function that runs a command as the console script does, in this process: exit code, stdout, stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["mammostream", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            mammostream.main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


@dataclass(frozen=True)
class Built:
    """A finished directory and the plan that it was built by."""

    plan: BuildPlan
    shards: ShardSet


@pytest.fixture(scope="session")
def manifest(cropped_films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of the 8 small films."""
    path = tmp_path_factory.mktemp("manifest") / "manifest.parquet"
    write_manifest(manifest_frame(cropped_films), path)
    return path


@pytest.fixture(scope="session")
def build_at(manifest: Path) -> Callable[..., Built]:
    """Return a function that builds the small films' shards in a directory, with some options changed."""

    def build(
        directory: Path,
        workers: int = 1,
        threads: int = 1,
        dask: str | None = None,
        films: pd.DataFrame | None = None,
        **options: Any,
    ) -> Built:
        frame = read_manifest(manifest) if films is None else films
        plan = make_plan(frame, directory, replace(CONFIG, **options))
        build_all(plan, Launcher(workers, threads, dask))
        finish(plan.output_dir)
        return Built(plan, open_shards(directory))

    return build


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Return a function that gives the bytes of a directory's files by name, without what a killed process left."""
    return lambda directory: {p.name: p.read_bytes() for p in directory.iterdir() if p.suffix != ".tmp"}


@pytest.fixture(scope="session")
def built(build_at: Callable[..., Built], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The shards of the 8 small films: 4 tars. Not to be changed; see `copied`."""
    return build_at(tmp_path_factory.mktemp("built") / "shards")


@pytest.fixture
def copied(built: Built, tmp_path: Path) -> ShardSet:
    """A copy of `built` that a test may damage."""
    return open_shards(shutil.copytree(built.shards.directory, tmp_path / "shards"))
