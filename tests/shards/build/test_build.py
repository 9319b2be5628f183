"""Building: the same bytes whoever builds, whatever is interrupted; bad films are rows; nobody's name is in a tar."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import webdataset as wds
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from mammostream.common.errors import BadInput
from mammostream.shards import decode_sample
from mammostream.shards.archive import read_index
from mammostream.shards.build.build import build_all, build_shard
from mammostream.shards.build.launch import Launcher
from mammostream.shards.build.merge import finish
from mammostream.shards.build.plan import BuildConfig, make_plan
from mammostream.shards.build.verify import verify_shards
from mammostream.shards.manifest import read_manifest
from mammostream.shards.reading import open_shards

MERGED = ("tiles.parquet", "images.parquet", "shards.json")


def test_directory_holds_what_the_design_says(built, contents):
    names = set(contents(built.shards.directory))
    shards = ("train-000000", "train-000001", "val-000000", "val-000001")
    assert names == {f"{shard}{suffix}" for shard in shards for suffix in (".tar", ".idx", ".parquet")} | set(MERGED)


def test_tables_agree_with_the_tars(built):
    tiles, images = built.shards.tiles(), built.shards.images()
    assert len(images) == 8
    assert (images["reason"] == "").all()
    assert (images["kept"] > 10).all()
    assert images["side"].tolist() == images["laterality"].tolist()
    kept = tiles.groupby("image_id").size()
    assert kept.to_dict() == images.set_index("image_id")["kept"].to_dict()
    rejected = images.filter(like="rejected_").sum(axis=1)
    assert (images["candidates"] == images["kept"] + rejected).all()
    assert tiles["key"].is_unique
    assert tiles["tile"].is_monotonic_increasing
    for ordinal, shard in enumerate(built.shards.shards()):
        rows = tiles[tiles["shard"] == shard.tar.stem]
        assert rows["tile"].tolist() == [ordinal * 2**20 + i for i in range(shard.tiles)]
        assert set(rows["split"]) == {shard.split}
        index = read_index(shard.index)
        assert [sample[0].name.partition(".")[0] for sample in index] == rows["key"].tolist()
        with tarfile.open(shard.tar) as tar:
            meta = [json.load(tar.extractfile(m)) for m in tar.getmembers() if m.name.endswith(".json")]
        columns = ["tile", "key", "image_id", "x", "y", "size"]
        assert meta == rows[columns].to_dict("records")
        # Tiles of a film do not lie together.
        assert (rows["image_id"] != rows["image_id"].shift()).sum() > 10


def test_muscle_is_measured_where_the_manifest_says_mlo_and_dropped_where_asked(built, build_at, manifest, tmp_path):
    tiles, images = built.shards.tiles(), built.shards.images().set_index("image_id")
    assert ((images["pectoral_area_mm2"] > 500) == (images["view"] == "MLO")).all()
    assert (tiles.groupby("image_id")["pectoral_ratio"].max() > 0.9).equals(images["view"].sort_index() == "MLO")
    assert (images["rejected_pectoral"] == 0).all()
    assert images.index[images["flags"] == "bright_fog"].tolist() == ["P1_rmlo", "P1_lmlo"]
    assert (images["flags"].drop(["P1_rmlo", "P1_lmlo"]) == "").all()
    few = build_at(tmp_path / "few", max_pectoral_ratio=0.3)
    kept = few.shards.tiles()
    expected = tiles[(tiles["pectoral_ratio"] <= 0.3) & (tiles["rule"] != "rescue")]
    assert kept.loc[kept["rule"] != "rescue", "key"].sort_values().tolist() == expected["key"].sort_values().tolist()
    assert (kept["pectoral_ratio"] <= 0.3).all()
    assert few.shards.images()["rejected_pectoral"].sum() == len(tiles[tiles["rule"] != "rescue"]) - len(expected)
    assert few.shards.preprocessing["max_pectoral_ratio"] == 0.3
    # The manifest's word is taken before the shape's.
    said = read_manifest(manifest).assign(view="CC")
    other = build_at(tmp_path / "cc", films=said).shards
    assert (other.images()["pectoral_area_mm2"] == 0).all()
    assert other.tiles()["key"].tolist() == tiles["key"].tolist()


def test_tiles_are_where_the_table_says(built, films):
    """The mapping keeps the order of grey values, so a tile's ranks are those of the film's own pixels at its place."""
    from mammostream.preprocess.reading import read_mammogram

    paths = read_manifest_paths(built)
    tiles = built.shards.tiles().set_index("key")
    for shard in built.shards.shards():
        for sample in list(wds.WebDataset(str(shard.tar), shardshuffle=False).decode(decode_sample))[::9]:
            row = tiles.loc[sample["__key__"]]
            native = read_mammogram(paths[row.image_id]).pixels[row.y : row.y + row["size"], row.x : row.x + row["size"]]
            order = np.argsort(native.ravel(), kind="stable")
            assert (np.diff(sample["tif"].ravel()[order].astype(int)) >= 0).all()
            assert row.mean_intensity == pytest.approx(sample["tif"].mean() / 65535, abs=1e-4)


def read_manifest_paths(built):
    return {row["image_id"]: row["path"] for shard in built.plan.shards for row in shard.rows}


def test_two_builds_are_the_same_bytes(built, build_at, contents, tmp_path):
    again = build_at(tmp_path / "again")
    assert contents(again.shards.directory) == contents(built.shards.directory)


def test_two_workers_give_the_same_bytes(built, build_at, contents, tmp_path):
    assert contents(build_at(tmp_path / "two", workers=2).shards.directory) == contents(built.shards.directory)


def test_threads_that_read_ahead_and_encode_give_the_same_bytes(built, build_at, contents, tmp_path):
    assert contents(build_at(tmp_path / "threads", threads=4).shards.directory) == contents(built.shards.directory)


def test_dask_gives_the_same_bytes(built, build_at, contents, tmp_path):
    assert contents(build_at(tmp_path / "dask", workers=2, dask="local").shards.directory) == contents(built.shards.directory)


def test_dask_that_is_not_there(built, tmp_path):
    import dask

    plan = rebase(built.plan, tmp_path)
    with dask.config.set({"distributed.comm.timeouts.connect": "200ms"}):
        for address in ("tcp://127.0.0.1:1", "nonsense"):
            with pytest.raises(BadInput, match=f"--dask {address}: no Dask scheduler answers there"):
                build_all(plan, Launcher(dask=address))


def test_a_plan_goes_to_workers_in_small_parts(manifest):
    """Each with its own shard's films only."""
    import pickle

    frame = pd.concat([read_manifest(manifest)] * 200, ignore_index=True)
    frame["image_id"] = [f"{name}-{n}" for n, name in enumerate(frame["image_id"])]
    plan = make_plan(frame, Path("nowhere"), BuildConfig(images_per_shard=8, device="cpu"))
    assert len(plan.shards) == 200
    part = plan.select(ordinals=range(150, 151))
    assert [row["image_id"] for shard in part.shards for row in shard.rows] == [r["image_id"] for r in plan.shards[150].rows]
    assert len(pickle.dumps(part)) < len(pickle.dumps(plan)) / 50


def test_labels_are_no_part_of_a_build(built, manifest, tmp_path):
    frame = read_manifest(manifest)
    frame["label:mass"] = pd.array([1, 0] * 4, dtype="Int8")
    assert make_plan(frame, tmp_path, built.plan.config).config_hash == built.plan.config_hash


def test_png_codec_holds_the_same_pixels(built, build_at, tmp_path):
    png = build_at(tmp_path / "png", codec="png")
    columns = ["tile", "key", "crc32"]
    pd.testing.assert_frame_equal(png.shards.tiles()[columns], built.shards.tiles()[columns])
    assert verify_shards(png.shards) == []


def test_another_seed_deals_and_shuffles_otherwise(built, build_at, tmp_path):
    other = build_at(tmp_path / "seed", seed=1)
    a, b = built.shards.tiles(), other.shards.tiles()
    assert a["key"].tolist() != b["key"].tolist()
    columns = ["key", "crc32", "breast_ratio", "freq_energy"]
    pd.testing.assert_frame_equal(
        *(t[columns].sort_values("key").reset_index(drop=True) for t in (a, b))
    )  # the tiles are the same


@pytest.mark.parametrize("suffixes", [(".tar", ".idx", ".parquet"), (".parquet",)])
def test_resume_gives_the_same_bytes(built, copied, contents, suffixes):
    shard = copied.shards()[1].tar
    for suffix in suffixes:
        shard.with_suffix(suffix).unlink()
    for name in MERGED:
        (copied.directory / name).unlink()
    untouched = copied.shards()[0].tar.stat().st_mtime_ns
    plan = rebase(built.plan, copied.directory)
    with pytest.raises(BadInput, match=rf"1 shards of .* not finished: 1 \({shard.stem}\)"):
        finish(plan.output_dir)
    build_all(plan)
    finish(plan.output_dir)
    assert contents(copied.directory) == contents(built.shards.directory)
    assert copied.shards()[0].tar.stat().st_mtime_ns == untouched


def rebase(plan, directory):
    from dataclasses import replace

    return replace(plan, output_dir=directory)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"stride": 32}, "--stride 48, not 32"),
        ({"min_breast_ratio": 0.2}, r"--min-breast-ratio 0\.15, not 0\.2"),
        ({"codec": "png"}, "--codec tif, not png"),
        ({"bit_depth": "8"}, "--bit-depth 16, not 8"),
        ({"seed": 5}, "--seed 0, not 5"),
        ({"images_per_shard": 3}, "--images-per-shard 2, not 3"),
    ],
)
def test_changed_option_is_refused_by_name(copied, build_at, contents, options, name):
    before = contents(copied.directory)
    with pytest.raises(BadInput, match=name):
        build_at(copied.directory, **options)
    assert contents(copied.directory) == before


def test_changed_manifest_is_refused(copied, build_at, manifest):
    frame = read_manifest(manifest)
    frame.loc[0, "laterality"] = ""
    with pytest.raises(BadInput, match="another manifest"):
        build_at(copied.directory, films=frame)


def test_moved_films_continue_their_build(copied, build_at, manifest, cropped_films, tmp_path, contents):
    frame = read_manifest(manifest)
    moved = shutil.copytree(cropped_films, tmp_path / "moved")
    frame["path"] = [str(moved / Path(p).name) for p in frame["path"]]
    before = contents(copied.directory)
    copied.shards()[2].tar.with_suffix(".parquet").unlink()
    build_at(copied.directory, films=frame)
    assert contents(copied.directory) == before


def test_output_that_is_a_file_is_refused(built, tmp_path):
    (tmp_path / "file").write_text("kept")
    for directory in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(BadInput, match=r"cannot make the folder .*file"):
            build_shard(rebase(built.plan, directory), 0)
    assert (tmp_path / "file").read_text() == "kept"


# A build that is killed with signal 9 at its n-th renaming of a finished file: in its own process, forked from one that
# has imported everything, for each n. Prints how each ended.
KILLED = """
import os, pickle, signal, sys
from dataclasses import replace
from pathlib import Path
from mammostream.shards.build import build
plan = pickle.load(open(sys.argv[1], "rb"))
for n in range(1, int(sys.argv[3]) + 1):
    child = os.fork()
    if not child:
        count = 0
        def kill(event, args):
            global count
            if event == "os.rename":
                count += 1
                if count == n:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(kill)
        mine = replace(plan, output_dir=Path(sys.argv[2]) / str(n))
        for ordinal in range(2):
            build.build_shard(mine, ordinal)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_kill_9_at_every_renaming(built, contents, tmp_path):
    import pickle

    (tmp_path / "plan").write_bytes(pickle.dumps(built.plan))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "plan", tmp_path, "7"], capture_output=True, text=True, check=True
    )
    # Two shards of three files each: six renamings, the seventh never comes.
    assert done.stdout.split() == [str(-signal.SIGKILL)] * 6 + ["0"]
    expected = contents(built.shards.directory)
    names = [f"train-00000{shard}{suffix}" for shard in (0, 1) for suffix in (".tar", ".idx", ".parquet")]
    for n in range(1, 7):
        there = contents(tmp_path / str(n))
        assert set(there) <= set(names)
        assert len(there) == n - 1
        assert ("train-000000.parquet" in there) == (n > 3)
        assert "train-000001.parquet" not in there
        assert all(expected[name] == data for name, data in there.items())  # what has its name is whole
    for n in (2, 3, 6):
        for ordinal in (0, 1):
            build_shard(rebase(built.plan, tmp_path / str(n)), ordinal)
        assert contents(tmp_path / str(n)) == {name: expected[name] for name in names}


def test_kill_9_of_the_command_in_the_middle(built, contents, manifest, tmp_path):
    options = ["--tile-size", "64", "--stride", "48", "--images-per-shard", "2", "--device", "cpu", "--workers", "1"]
    command = [*MAMMOSTREAM, "shards", "build", "--manifest", str(manifest), "--output-dir", str(tmp_path / "s"), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "s" / "train-000000.parquet").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    there = contents(tmp_path / "s")
    assert "shards.json" not in there
    with pytest.raises(BadInput, match=r"has no shards\.json"):
        open_shards(tmp_path / "s")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"8 films (0 gave no tiles), {len(built.shards.tiles())} tiles" in done.stdout
    got = contents(tmp_path / "s")
    got.pop("config.yaml")
    assert got == contents(built.shards.directory)


def test_kill_9_of_a_worker_ends_with_what_to_do(manifest, tmp_path):
    options = ["--tile-size", "64", "--stride", "48", "--images-per-shard", "1", "--device", "cpu", "--workers", "2"]
    command = [*MAMMOSTREAM, "shards", "build", "--manifest", str(manifest), "--output-dir", str(tmp_path / "s"), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("s/*.parquet")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    worker = next(p for p in children.read_text().split() if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes())
    os.kill(int(worker), signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2, errors
    assert "error: a worker process was killed" in errors
    assert "Traceback" not in errors
    subprocess.run(command, capture_output=True, check=True)
    assert verify_shards(open_shards(tmp_path / "s")) == []


MAMMOSTREAM = [sys.executable, "-c", "from mammostream import main; main()"]


def identified_dicom(path, pixels):
    """Write a film as DICOM with everything that names a patient."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "Doe^Jane", "MRN-4711-X", "19560203"
    dataset.InstitutionName, dataset.StudyInstanceUID = "General Hospital", "1.2.3.4711"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = 15, 0, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelSpacing = [0.4, 0.4]
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)


def test_no_identity_in_the_tars(films, build_at, tmp_path):
    from mammostream.shards.prepare.films import prepare_films

    (tmp_path / "images").mkdir()
    identified_dicom(tmp_path / "images" / "film.dcm", np.ascontiguousarray(films[1].pixels[::2, ::2]))
    names = [b"Doe", b"Jane", b"MRN-4711", b"19560203", b"Hospital", b"1.2.3.4711"]
    source = (tmp_path / "images" / "film.dcm").read_bytes()
    assert all(name in source for name in names)
    frame = prepare_films("folder", tmp_path / "images").manifest
    assert frame["patient_id"].tolist() == ["MRN-4711-X"]
    made = build_at(tmp_path / "s", films=frame)
    assert len(made.shards.tiles()) > 10
    for shard in made.shards.shards():
        for path in (shard.tar, shard.index):
            assert not [name for name in names if name in path.read_bytes()]


def damaged_manifest(manifest, tmp_path):
    """Return the manifest with one film cut short and one black."""
    frame = read_manifest(manifest)
    (tmp_path / "cut.png").write_bytes(Path(frame.loc[0, "path"]).read_bytes()[:5000])
    import tifffile

    tifffile.imwrite(tmp_path / "black.tif", np.zeros((570, 358), np.uint16))
    frame.loc[0, "path"], frame.loc[5, "path"] = str(tmp_path / "cut.png"), str(tmp_path / "black.tif")
    return frame


def test_bad_films_are_rows_with_their_reason(manifest, build_at, tmp_path):
    frame = damaged_manifest(manifest, tmp_path)
    made = build_at(tmp_path / "s", films=frame)
    images = made.shards.images().set_index("image_id")
    assert len(images) == 8
    cut, black = images.loc[frame.loc[0, "image_id"]], images.loc[frame.loc[5, "image_id"]]
    assert "image P0_lcc cannot be read" in cut.reason
    assert "cut.png" not in cut.reason  # nor any folder: where films lie is no part of a shard
    assert black.reason == "no breast found"
    assert (cut.kept, black.kept) == (0, 0)
    assert (images["reason"] != "").sum() == 2
    assert set(made.shards.tiles()["image_id"]) == set(images.index[images["reason"] == ""])
    assert verify_shards(made.shards) == []


def test_a_shard_without_tiles_has_only_its_table(manifest, build_at, contents, tmp_path):
    frame = read_manifest(manifest, "val")
    frame["path"] = [str(tmp_path / f"nothing{i}.png") for i in range(4)]
    made = build_at(tmp_path / "s", films=frame)
    assert set(contents(tmp_path / "s")) == {"val-000000.parquet", "val-000001.parquet", *MERGED}
    assert verify_shards(made.shards) == []
    assert made.shards.tiles().empty
    with pytest.raises(BadInput, match="has no tiles at all"):
        made.shards.shards()
    # Finished all the same: not built again.
    plan = make_plan(frame, tmp_path / "s", made.plan.config)
    assert [summary.bad_images for summary in build_all(plan)] == [2, 2]


def test_unknown_split_names_those_there(built):
    with pytest.raises(BadInput, match=r"no tiles of split 'test'.*it has: train, val"):
        built.shards.shards("test")
    with pytest.raises(BadInput, match=r"\(did you mean 'train'\?\)"):
        built.shards.shards("trian")


def test_webdataset_and_dali_read_the_same_pixels(built):
    from mammostream.dali_pipelines import LabelledLoader

    crc = built.shards.tiles().set_index("tile")["crc32"]
    size = built.shards.preprocessing["tile_size"]
    theirs = {}
    for shard in built.shards.shards():
        for sample in wds.WebDataset(str(shard.tar), shardshuffle=False).decode(decode_sample):
            assert sample["json"]["tile"] == sample["num"]
            theirs[sample["num"]] = sample["tif"]
    assert list(theirs) == crc.index.tolist()
    loader = LabelledLoader(built.shards.shards(), batch_size=32, tile_size=size, mean=0.25, std=0.5, view=None)
    seen = 0
    for batch, numbers in loader:
        for tile, number in zip(batch[:, 0].numpy(), numbers.tolist(), strict=True):
            pixels = np.rint((tile.astype(np.float64) * 0.5 + 0.25) * 65535).astype(np.uint16)
            np.testing.assert_array_equal(pixels, theirs[number])
            assert zlib.crc32(pixels.tobytes()) == crc[number]
            seen += 1
    assert seen == len(crc)


@pytest.mark.parametrize("decoding", [(), (decode_sample,)])
def test_the_webdataset_library_iterates_the_shards(built, decoding):
    """Also without our decoder: then tiles stay bytes."""
    paths = [str(shard.tar) for shard in built.shards.shards()]
    samples = list(wds.WebDataset(paths, shardshuffle=False).decode(*decoding))
    tiles = built.shards.tiles()
    assert [sample["__key__"] for sample in samples] == tiles["key"].tolist()
    assert [sample["json"]["tile"] for sample in samples] == tiles["tile"].tolist()
    for sample, crc in zip(samples, tiles["crc32"], strict=True):
        pixels = sample["tif"] if decoding else decode_sample("tif", sample["tif"])
        assert zlib.crc32(pixels.tobytes()) == crc


def test_eight_bit_films_give_eight_bit_tiles(films, build_at, tmp_path):
    from PIL import Image

    from mammostream.shards.prepare.films import prepare_films

    (tmp_path / "images").mkdir()
    for film in films[:2]:
        Image.fromarray((film.pixels[::2, ::2] >> 8).astype(np.uint8)).save(tmp_path / "images" / f"{film.name}.png")
    frame = prepare_films("folder", tmp_path / "images", patient_regex=r"P\d").manifest
    made = build_at(tmp_path / "s", films=frame.assign(split="train", pixel_spacing_mm=0.4, spacing_source="assumed"))
    assert made.shards.meta["bits"] == 8
    sample = next(iter(wds.WebDataset(str(made.shards.shards()[0].tar), shardshuffle=False).decode(decode_sample)))
    assert sample["tif"].dtype == np.uint8


def test_open_shards_refuses_what_is_none(copied, tmp_path):
    (tmp_path / "empty").mkdir()
    for directory, message in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "is not a finished shard directory"),
    ):
        with pytest.raises(BadInput, match=message):
            open_shards(directory)
    path = copied.directory / "shards.json"
    text = path.read_text()
    for damaged, message in (
        (text[:-40], "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        (text.replace('"format_version": 2', '"format_version": 3'), "has format 3"),
    ):
        path.write_text(damaged)
        with pytest.raises(BadInput, match=message):
            open_shards(copied.directory)


def test_dealing_is_by_seed_and_split(manifest, built):
    frame = read_manifest(manifest)
    names = [s.name for s in built.plan.shards]
    assert names == ["train-000000", "train-000001", "val-000000", "val-000001"]
    dealt = [row["image_id"] for shard in built.plan.shards for row in shard.rows]
    assert sorted(dealt) == sorted(frame["image_id"])
    assert dealt != frame["image_id"].tolist()
    for shard in built.plan.shards:
        assert {row["split"] for row in shard.rows} == {shard.split}
    same = make_plan(frame, built.plan.output_dir, built.plan.config)
    assert same.config_hash == built.plan.config_hash
    assert set(built.plan.recipe["versions"]) >= {"pydicom", "numpy", "scikit-image", "imagecodecs"}


def test_splits_may_be_built_one_after_the_other(built, manifest, tmp_path, contents):
    plan = make_plan(read_manifest(manifest), tmp_path / "shards", built.plan.config)
    build_all(plan.select("train"))
    finish(plan.output_dir, "train")
    assert open_shards(plan.output_dir).splits == ["train"]
    with pytest.raises(BadInput, match=r"not finished: 2 \(val-000000\), 3 \(val-000001\)"):
        finish(plan.output_dir)
    build_all(plan.select("val"))
    finish(plan.output_dir, "val")
    assert contents(plan.output_dir) == contents(built.shards.directory)


def test_where_the_films_lie_is_no_part_of_a_shard(build_at, manifest, cropped_films, tmp_path, contents):
    tables = []
    for name in ("here", "there"):
        films = shutil.copytree(cropped_films, tmp_path / name)
        bad = next(films.iterdir())
        bad.write_bytes(b"no image")
        frame = read_manifest(manifest)
        frame["path"] = [str(films / Path(p).name) for p in frame["path"]]
        tables.append(contents(build_at(tmp_path / f"{name}-shards", films=frame).shards.directory))
    assert tables[0] == tables[1]
