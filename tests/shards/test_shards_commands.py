"""The commands: the pipeline from films to labelled shards, bad inputs in one line, spellings, help."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mammostream import cli as program
from mammostream.shards.manifest import read_findings, read_manifest
from mammostream.shards.reading import open_shards

MAMMOSTREAM = Path(sys.executable).with_name("mammostream")
TILING = ["--tile-size", "64", "--stride", "48", "--device", "cpu", "--workers", "1"]


@pytest.fixture
def refused(call, tmp_path):
    """Return a function that runs a command with bad input and gives its one line; nothing may be written."""

    def run(*args, code=2):
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
        got, _, err = call(*args)
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert got == code, err
        assert "Traceback" not in err
        assert len(errors) == 1, err
        assert err.splitlines()[-1] == errors[0]
        after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
        assert after == before
        return errors[0]

    return run


def prepare(call, images, output, *more):
    code, out, err = call(
        "prepare", "--images-root", images, "--output-dir", output, "--patient-regex", r"P\d", "--val-fraction", "0.5", *more
    )
    assert code == 0, err
    return out


def test_road_from_films_to_labels(call, cropped_films, tmp_path):
    out = prepare(call, cropped_films, tmp_path / "films", "--assume-spacing", "0.4")
    assert "8 images of 2 patients" in out
    frame = read_manifest(tmp_path / "films/manifest.parquet")
    assert sorted(frame["split"].unique()) == ["train", "val"]
    assert (frame.groupby("patient_id")["split"].nunique() == 1).all()
    assert set(frame["spacing_source"]) == {"assumed"}

    code, out, _ = call(
        *["simulate", "--manifest", tmp_path / "films/manifest.parquet", "--output-dir", tmp_path / "simulated"],
        *["--clusters-per-image", "3", "--min-speck-mm", "0.8", "--max-speck-mm", "1.2", "--copies", "1"],
    )
    assert code == 0
    copies, findings = (
        read_manifest(tmp_path / "simulated/manifest.parquet"),
        read_findings(tmp_path / "simulated/findings.parquet"),
    )
    assert len(copies) == 8
    assert set(findings["image_id"]) <= set(copies["image_id"])
    assert set(findings["label"]) == {"simulated_calcification"}
    assert f"{len(findings)} simulated clusters in 8 copies" in out
    assert dict(zip(copies["patient_id"], copies["split"], strict=True)) == dict(
        zip(frame["patient_id"], frame["split"], strict=True)
    )

    shards = tmp_path / "shards"
    code, out, _ = call(
        "shards", "build", "--manifest", tmp_path / "simulated/manifest.parquet", "--output-dir", shards, *TILING
    )
    assert code == 0
    opened = open_shards(shards)
    assert f"8 films (0 gave no tiles), {len(opened.tiles())} tiles -> {shards}" in out
    config = (shards / "config.yaml").read_text()
    assert "tile_size: 64" in config
    assert "max_bad: 5%" in config

    code, out, _ = call("shards", "verify", shards)
    assert (code, out.splitlines()[-1]) == (0, f"2 shards, {len(opened.tiles())} tiles: all well")
    code, out, _ = call("shards", "info", shards)
    assert code == 0
    assert "codec: tif" in out

    labels = tmp_path / "labels.csv"
    code, out, _ = call(
        *["shards", "labels", shards, "--split", "train", "--output", labels],
        *["--findings", tmp_path / "simulated/findings.parquet"],
    )
    assert code == 0
    table = pd.read_csv(labels)
    assert table["tile_path"].tolist() == opened.tiles("train")["key"].tolist()
    values = table["simulated_calcification"].value_counts(dropna=False)
    assert values[1.0] > 0
    assert values[0.0] > values[1.0]

    code, _, err = call(
        *["preview", "--image-path", copies.loc[0, "path"], "--assume-spacing", "0.4", "--output-dir", tmp_path / "pictures"],
        *["--findings", tmp_path / "simulated/findings.parquet", "--tile-size", "64", "--stride", "48"],
    )
    assert code == 0, err
    pictures = list((tmp_path / "pictures").glob("*.png"))
    assert [p.stem for p in pictures] == [copies.loc[0, "image_id"]]
    with Image.open(pictures[0]) as picture:
        assert len(set(picture.convert("RGB").resize((60, 60)).get_flattened_data())) > 100


def test_preview_of_a_manifest(call, manifest, tmp_path):
    frame = read_manifest(manifest)
    (tmp_path / "cut.png").write_bytes(b"no image")
    frame.loc[1, "path"] = str(tmp_path / "cut.png")
    frame.to_parquet(tmp_path / "manifest.parquet")
    command = ["preview", "--manifest", tmp_path / "manifest.parquet", "--tile-size", "64", "--stride", "48"]
    command += ["--output-dir", tmp_path / "out"]
    code, out, err = call(*command, "--workers", "2")
    assert code == 0, err
    assert f"no picture: {frame.loc[1, 'image_id']}: image {tmp_path / 'cut.png'} cannot be read" in err
    assert f"7 pictures, 1 films without -> {tmp_path / 'out'}" in out
    films = {f"{name}.png" for name in frame["image_id"].drop(1)}
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == films | {"contact_sheet.png", "energies.png"}
    kept = next(int(line.split()[1]) for line in out.splitlines() if line.startswith("kept "))

    # The numbers are those of the build.
    code, built, _ = call("shards", "build", "--manifest", manifest, "--output-dir", tmp_path / "s", *TILING)
    assert code == 0
    images = open_shards(tmp_path / "s").images().set_index("image_id").drop(frame.loc[1, "image_id"])
    assert kept == images["kept"].sum() > 50

    # Again: nothing is drawn, and the same is said. Two films by chance: the same two for the same seed.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir() if p.name in films}
    code, again, _ = call(*command)
    assert (code, again) == (0, out)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    command[-1] = tmp_path / "some"
    chosen = []
    for seed in (1, 1, 2):
        assert call(*command, "--sample", "2", "--seed", seed, "--overwrite")[0] == 0
        chosen.append({p.name for p in (tmp_path / "some").glob("P*.png")})
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) <= 2
    assert chosen[2] > chosen[1]


def test_preview_lists_films_first_whose_side_disagrees(call, manifest, tmp_path):
    frame = read_manifest(manifest)
    frame.loc[[4, 6], "laterality"] = frame.loc[[4, 6], "laterality"].map({"L": "R", "R": "L"})
    frame.to_parquet(tmp_path / "m.parquet")
    command = ["preview", "--manifest", tmp_path / "m.parquet", "--tile-size", "64", "--stride", "48"]
    code, out, err = call(*command, "--output-dir", tmp_path / "out")
    assert code == 0, err
    listed = [line.split(": ")[1] for line in out.splitlines() if line.startswith("side disagrees: ")]
    assert sorted(listed) == sorted(frame["image_id"][[4, 6]])
    assert any(line.split() == ["side_disagrees", "2", "films"] for line in out.splitlines())
    # The first cells of the contact sheet are theirs: the same as a sheet of their own begins with.
    frame.loc[[4, 6, 0, 1, 2, 3, 5, 7]].to_parquet(tmp_path / "sorted.parquet")
    command[2] = tmp_path / "sorted.parquet"
    assert call(*command, "--output-dir", tmp_path / "sorted")[0] == 0
    with Image.open(tmp_path / "out/contact_sheet.png") as one, Image.open(tmp_path / "sorted/contact_sheet.png") as other:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_long_folders_do_not_stop_any_command(call, cropped_films, tmp_path):
    """Ids that are paths in another script: three bytes a letter once escaped."""
    for number, path in enumerate(sorted(cropped_films.glob("*.png"))):
        folder = tmp_path / "in" / f"Пациентка Иванова P{number}" / "Маммография обеих молочных желёз" / "Правая CC"
        folder.mkdir(parents=True)
        (folder / "IM-0001.png").write_bytes(path.read_bytes())
    prepare(call, tmp_path / "in", tmp_path / "w", "--assume-spacing", "0.4", "--copy")
    assert len(list((tmp_path / "w").glob("*/*.png"))) == 4
    films = ["--manifest", tmp_path / "w/manifest.parquet"]
    assert call("shards", "build", *films, "--output-dir", tmp_path / "s", *TILING)[0] == 0
    tiles = open_shards(tmp_path / "s").tiles()
    assert call("shards", "unpack", tmp_path / "s", "--output-dir", tmp_path / "u")[0] == 0
    unpacked = pd.read_csv(tmp_path / "u/tiles.csv")["tile_path"]
    assert unpacked.is_unique
    assert len(unpacked) == len(tiles)
    assert all((tmp_path / "u" / name).is_file() for name in unpacked)
    assert call("preview", *films, "--output-dir", tmp_path / "p", "--tile-size", "64", "--stride", "48")[0] == 0
    assert len(list((tmp_path / "p").glob("*.png"))) == 4 + 2
    assert call("simulate", *films, "--output-dir", tmp_path / "sim")[0] == 0


def test_build_again_does_nothing_and_says_the_same(call, manifest, tmp_path):
    command = ["shards", "build", "--manifest", manifest, "--output-dir", tmp_path / "s", "--split", "train", *TILING]
    first = call(*command)
    tar = tmp_path / "s" / "train-000000.tar"
    written = tar.stat().st_mtime_ns
    second = call(*command)
    assert first[0] == second[0] == 0
    assert first[1] == second[1]
    assert tar.stat().st_mtime_ns == written
    code, _, err = call(*command, "--stride", "40")
    assert code == 2
    assert "--stride 48, not 40" in err.splitlines()[-1]


def test_two_ranges_and_finish_give_the_bytes_of_one_build(call, refused, manifest, built, contents, tmp_path):
    def of_range(text):
        return call(
            *["shards", "build", "--manifest", manifest, "--output-dir", tmp_path / "s", "--shard-range", text, *TILING],
            *["--images-per-shard", "2"],
        )

    code, out, err = of_range("2:40")
    assert code == 0, err
    assert f"built 2 of 4 shards; when all are, run 'mammostream shards finish {tmp_path / 's'}'" in out
    assert "4 films (0 gave no tiles)" in out
    assert {p.suffix for p in (tmp_path / "s").glob("*.*")} == {".tar", ".idx", ".parquet", ".yaml"}
    assert "2 shards of" in refused("shards", "finish", tmp_path / "s")
    assert "are not finished: 0 (train-000000), 1 (train-000001)" in refused("shards", "finish", tmp_path / "s")
    assert of_range("0:2")[0] == 0
    code, out, err = of_range("4:8")
    assert (code, out) == (0, "the plan has 4 shards, none of them in this range: nothing to do\n")
    for _ in range(2):
        code, out, err = call("shards", "finish", tmp_path / "s")
        assert code == 0, err
        assert f"8 films (0 gave no tiles), {len(built.shards.tiles())} tiles" in out
    files = contents(tmp_path / "s")
    files.pop("config.yaml")
    assert files == contents(built.shards.directory)


@pytest.mark.parametrize("text", ["3", "3:", ":3", "3:3", "4:2", "-1:2", "a:b", "0:1:2", ""])
def test_a_range_that_is_none(refused, manifest, tmp_path, text):
    said = refused("shards", "build", "--manifest", manifest, "--output-dir", tmp_path / "s", f"--shard-range={text}", *TILING)
    assert f"--shard-range '{text}' is not A:B" in said


def test_finish_counts_bad_films(call, copied, refused):
    from mammostream.shards.tables import read_shard_table, write_shard_table

    table = copied.shards()[0].tar.with_suffix(".parquet")
    tiles, images, metadata = read_shard_table(table)
    rows = images.to_pylist()
    rows[0]["reason"] = "it is bad"
    write_shard_table(table, tiles.to_pylist(), rows, metadata)
    code, out, err = call("shards", "finish", copied.directory)
    assert code == 3
    assert "1 of 8 films gave no tiles, more than --max-bad 5%" in err.splitlines()[-1]
    assert call("shards", "finish", copied.directory, "--max-bad", "1")[0] == 0
    assert call("shards", "finish", copied.directory, "--split", "val")[0] == 0


def test_verify_and_quarantine(call, copied, built):
    from mammostream.shards.archive import read_index

    shard = copied.shards()[1]
    sample = read_index(shard.index)[7]
    data = bytearray(shard.tar.read_bytes())
    data[sample[0].offset + 30] ^= 8
    shard.tar.write_bytes(data)
    key = sample[0].name.partition(".")[0]
    code, _, err = call("shards", "verify", copied.directory, "--no-decode", "--workers", "1")
    assert code == 2
    assert f"fault: train-000001: sample {key}: the bytes of its .tif changed" in err.splitlines()
    assert "--quarantine" in err.splitlines()[-1]
    code, out, _ = call("shards", "verify", copied.directory, "--quarantine", "--workers", "1")
    assert code == 0
    assert out.splitlines()[0] == f"left out: train-000001: sample {key}: the bytes of its .tif changed"
    code, out, _ = call("shards", "verify", copied.directory, "--workers", "1")
    assert (code, out) == (0, f"4 shards, {len(built.shards.tiles()) - 1} tiles: all well\n")


def test_labels_of_films(call, refused, copied, manifest, tmp_path):
    from mammostream.shards.manifest import write_manifest

    frame = read_manifest(manifest)
    frame["label:malignant"] = pd.array([1, 0, None, 0] * 2, dtype="Int8")
    frame["label:birads_4"] = pd.array([0, 1] * 4, dtype="Int8")
    write_manifest(frame, tmp_path / "m.parquet")
    labels = ["shards", "labels", copied.directory, "--output", tmp_path / "l.csv"]
    films = [*labels, "--manifest", tmp_path / "m.parquet", "--image-labels"]
    tiles = copied.tiles()
    for names in (["malignant"], ["birads_4", "malignant"], ["birads_4,malignant"], ["all"]):
        code, out, err = call(*films, *names)
        assert code == 0, err
        table = pd.read_csv(tmp_path / "l.csv")
        classes = ["birads_4", "malignant"] if names == ["all"] else names[0].split(",") + names[1:]
        assert table.columns.tolist() == ["tile_path", *classes]
        assert table["tile_path"].tolist() == tiles["key"].tolist()
        for name in classes:
            by_film = frame.set_index("image_id")[f"label:{name}"].astype("Float64")
            expected = by_film.reindex(tiles["image_id"]).to_numpy(float, na_value=np.nan)
            np.testing.assert_array_equal(table[name].to_numpy(float), expected)
    # Next to boxes.
    row = tiles.iloc[5]
    box = {"image_id": row.image_id, "label": "mass", "xmin": row.x, "ymin": row.y, "xmax": row.x + 9, "ymax": row.y + 9}
    pd.DataFrame([box]).to_parquet(tmp_path / "boxes.parquet")
    pd.DataFrame([box | {"label": "malignant"}]).to_parquet(tmp_path / "clash.parquet")
    assert call(*films, "malignant", "--findings", tmp_path / "boxes.parquet")[0] == 0
    table = pd.read_csv(tmp_path / "l.csv")
    assert table.columns.tolist() == ["tile_path", "mass", "malignant"]
    assert table.loc[5, "mass"] == 1
    # The manifest next to the boxes tells which films have a lesion that nobody boxed.
    films_with = frame["image_id"].isin([row.image_id, tiles["image_id"].iloc[-1]])
    frame.loc[films_with, "label:mass"] = 1
    write_manifest(frame.fillna({"label:mass": 0}).astype({"label:mass": "Int8"}), tmp_path / "manifest.parquet")
    assert call(*labels, "--findings", tmp_path / "boxes.parquet")[0] == 0
    unboxed = (tiles["image_id"] == tiles["image_id"].iloc[-1]).to_numpy()
    assert tiles["image_id"].iloc[-1] != row.image_id
    np.testing.assert_array_equal(pd.read_csv(tmp_path / "l.csv")["mass"].isna(), table["mass"].isna() | unboxed)
    frame = frame.drop(columns="label:mass")
    # What cannot be.
    frame["image_id"] += "_other"
    write_manifest(frame, tmp_path / "other.parquet")
    bare = frame.drop(columns=["label:malignant", "label:birads_4"])
    write_manifest(bare, tmp_path / "bare.parquet")
    (tmp_path / "l.csv").unlink()
    other, bare = (["--manifest", tmp_path / f"{name}.parquet", "--image-labels", "all"] for name in ("other", "bare"))
    for arguments, message in [
        (labels, "give --findings, or --manifest with --image-labels"),
        ([*labels, "--manifest", tmp_path / "m.parquet"], "give --findings, or --manifest with --image-labels"),
        ([*labels, "--image-labels", "all"], "give --findings, or --manifest with --image-labels"),
        ([*films, "malignent"], "no label 'malignent' (did you mean 'malignant'?)"),
        ([*films, "all", "--findings", tmp_path / "clash.parquet"], "'malignant' is a label of both"),
        ([*labels, *other], "has none of the films"),
        ([*labels, *bare], "the manifest has no labels"),
    ]:
        assert message in refused(*arguments)


def test_unpack_and_pack(call, refused, built, tmp_path):
    shards = built.shards.directory
    tiles, packed = tmp_path / "tiles", tmp_path / "packed"
    code, out, err = call("shards", "unpack", shards, "--split", "train", "--output-dir", tiles, "--workers", "1")
    assert code == 0, err
    count = len(built.shards.tiles("train"))
    assert f"{count} tiles -> {tiles}" in out
    assert len(list(tiles.glob("*.png"))) == count
    pack = ["shards", "pack", "--csv", tiles / "tiles.csv", "--tiles-dir", tiles, "--output-dir", packed, "--workers", "1"]
    victim = next(tiles.glob("*.png"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:50])
    code, out, err = call(*pack, "--max-bad", "0")
    assert code == 3
    assert f"no tiles: {victim.name.partition('_y')[0]}: image {victim.stem} cannot be read" in err
    assert f"{count - 1} tiles packed, 1 left out" in out
    for path in packed.glob("*.parquet"):
        path.unlink()
    victim.write_bytes(whole)
    code, out, err = call(*pack)
    assert code == 0, err
    assert f"{count} tiles packed, 0 left out -> {packed}; labels: {packed / 'tiles.csv'}" in out
    assert call("shards", "verify", packed, "--workers", "1")[1] == f"1 shards, {count} tiles: all well\n"
    assert call("shards", "info", packed)[0] == 0
    assert "--seed 0, not 1" in refused(*pack, "--seed", "1")


@pytest.mark.parametrize(("limit", "code"), [("1", 0), ("5%", 3)])
def test_bad_films_and_the_limit(call, manifest, tmp_path, limit, code):
    from mammostream.shards.manifest import write_manifest

    frame = read_manifest(manifest)
    (tmp_path / "cut.tif").write_bytes(b"II*\0 and then nothing")
    frame.loc[6, "path"] = str(tmp_path / "cut.tif")
    write_manifest(frame, tmp_path / "manifest.parquet")
    got, out, err = call(
        *["shards", "build", "--manifest", tmp_path / "manifest.parquet", "--output-dir", tmp_path / "s", "--max-bad", limit],
        *["--tile-size", "128", "--stride", "128", "--device", "cpu", "--min-nonzero", "0.3", "--min-intensity", "5"],
        *["--workers", "1"],
    )
    assert got == code, err
    images = open_shards(tmp_path / "s").images().set_index("image_id")
    assert "image P1_rcc cannot be read" in images.loc[frame.loc[6, "image_id"], "reason"]
    assert "8 films (1 gave no tiles)" in out
    assert any(line.startswith(f"no tiles: {frame.loc[6, 'image_id']}: ") for line in err.splitlines())
    if code:
        assert err.splitlines()[-1].startswith("error: 1 of 8 films gave no tiles")


@pytest.fixture
def folder(tmp_path):
    """A folder of three tiny images of two patients."""
    root = tmp_path / "images"
    root.mkdir()
    for name in ("P1_a", "P1_b", "P2_a"):
        Image.fromarray(np.full((20, 10), 900, np.uint16)).save(root / f"{name}.png")
    return root


def test_bad_prepare(refused, folder, tmp_path):
    out = ["--output-dir", tmp_path / "out"]
    regex = ["--patient-regex", r"P\d"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_id.csv").write_text("id,mass\nP1_a,1\n")
    (tmp_path / "torn.csv").write_text("image_id,split\nP1_a,train\nP1_b,val\nP2_a,train\n")
    (tmp_path / "file").write_text("kept")
    cases = [
        (["--images-root", tmp_path / "nowhere", *out], "nowhere does not exist"),
        (["--images-root", tmp_path / "empty", *out], "holds no images"),
        (["--images-root", folder, *out], "names no patient; give --patient-regex"),
        (["--images-root", folder, *out, *regex, "--csv-path", tmp_path / "missing.csv"], "missing.csv does not exist"),
        (["--images-root", folder, *out, *regex, "--csv-path", tmp_path / "no_id.csv"], "no column 'image_id'"),
        (
            ["--images-root", folder, *out, *regex, "--csv-path", tmp_path / "torn.csv"],
            "patient 'P1' is in the splits train and val",
        ),
        (["--images-root", folder, "--output-dir", tmp_path / "file", *regex], "cannot write"),
        (["--images-root", folder, *out, "--val-fraction", "2"], "--val-fraction"),
        (["--images-root", folder], "Missing option '--output-dir'"),
        (["--images-rot", folder], "--images-rot"),
    ]
    for args, message in cases:
        assert message in refused("prepare", *args)
    assert not (tmp_path / "out").exists()


def test_bad_preview(refused, folder, tmp_path):
    out = ["--output-dir", tmp_path / "out"]
    (tmp_path / "broken.png").write_bytes(b"no image")
    for args, message in [
        (["--image-path", tmp_path / "broken.png"], "broken.png cannot be read"),
        (["--image-path", tmp_path / "nowhere.png"], "nowhere.png does not exist"),
        (["--image-path", folder], "does not exist"),
        ([], "either --manifest or --image-path"),
        (["--manifest", tmp_path / "m", "--image-path", tmp_path / "broken.png"], "either --manifest or --image-path"),
        (["--manifest", tmp_path / "nowhere.parquet"], "nowhere.parquet does not exist"),
        (["--manifest", tmp_path / "broken.png"], "is not a Parquet file"),
        (["--image-path", folder / "P1_a.png", "--tile-size", "0"], "--tile-size 0"),
    ]:
        assert message in refused("preview", *args, *out)
    assert not (tmp_path / "out").exists()


def test_bad_shards(refused, manifest, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "file").write_text("kept")
    torn = read_manifest(manifest)
    torn.loc[0, "split"] = "val"
    torn.to_parquet(tmp_path / "torn.parquet")
    out = ["--output-dir", tmp_path / "out"]
    build = ["shards", "build", "--manifest", manifest]
    for args, message in [
        (["shards", "build", "--manifest", tmp_path / "nowhere", *out], "nowhere does not exist"),
        (["shards", "build", "--manifest", tmp_path / "torn.parquet", *out], "patient 'P0' is in the splits"),
        ([*build, *out, "--max-bad", "few"], "--max-bad 'few'"),
        ([*build, *out, "--split", "test"], "no rows of split 'test'"),
        ([*build, *out, "--codec", "jpg"], "--codec"),
        ([*build, *out, "--config", tmp_path / "nowhere.yaml"], "nowhere.yaml does not exist"),
        ([*build, "--output-dir", tmp_path / "file"], "cannot make the folder"),
        (["shards", "verify", tmp_path / "none"], "is not a finished shard directory"),
        (["shards", "verify", tmp_path / "nowhere"], "does not exist"),
        (["shards", "info", tmp_path / "none"], "is not a finished shard directory"),
        (
            ["shards", "labels", tmp_path / "none", "--findings", tmp_path / "f", "--output", tmp_path / "l.csv"],
            "not a finished shard",
        ),
        (["simulate", "--manifest", tmp_path / "nowhere", *out], "nowhere does not exist"),
        (["shards", "biuld"], "biuld"),
        (["shrads"], "shrads"),
    ]:
        assert message in refused(*args)
    assert not (tmp_path / "out").exists()


def test_bad_labels_and_faults(refused, copied, tmp_path):
    labels = ["shards", "labels", copied.directory, "--output", tmp_path / "l.csv"]
    assert "findings" in refused(*labels, "--findings", tmp_path / "nowhere")
    assert "no column 'label'" in refused(*labels, "--findings", copied.directory / "tiles.parquet")
    assert "no tiles of split 'test'" in refused(*labels, "--findings", tmp_path / "nowhere", "--split", "test")
    # Boxes of films that are not here would make every tile a negative.
    strange = pd.DataFrame([{"image_id": 7, "label": "mass", "xmin": 0, "ymin": 0, "xmax": 9, "ymax": 9}])
    strange.to_parquet(tmp_path / "strange.parquet")
    assert "none of the 1 boxes" in refused(*labels, "--findings", tmp_path / "strange.parquet")
    strange.assign(xmin="left").to_parquet(tmp_path / "strange.parquet")
    assert "boxes are numbers" in refused(*labels, "--findings", tmp_path / "strange.parquet")
    assert not (tmp_path / "l.csv").exists()
    tar = copied.shards()[0].tar
    tar.write_bytes(tar.read_bytes()[:-3000])
    assert "1 faults" in refused("shards", "verify", copied.directory)


def test_simulation_without_spacing_is_refused(call, refused, folder, tmp_path):
    prepare(call, folder, tmp_path / "films")
    message = refused("simulate", "--manifest", tmp_path / "films/manifest.parquet", "--output-dir", tmp_path / "out")
    assert "has no pixel spacing" in message
    assert "--assume-spacing" in message
    assert not (tmp_path / "out").exists()


def test_the_console_script_itself(tmp_path):
    done = subprocess.run(
        [MAMMOSTREAM, "shards", "verify", tmp_path / "nowhere"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")


def test_hyphen_and_underscore_are_alike(call, folder, tmp_path):
    for sign in "-_":
        code, _, err = call(
            *["prepare", f"--images{sign}root", folder, f"--output{sign}dir", tmp_path / sign, f"--patient{sign}regex", r"P\d"],
            *[f"--val{sign}fraction=0.5", f"--assume{sign}spacing", "0.1"],
        )
        assert code == 0, err
    assert (tmp_path / "-/manifest.parquet").read_bytes() == (tmp_path / "_/manifest.parquet").read_bytes()


def test_config_file_of_a_command(call, folder, tmp_path):
    settings = {"images-root": str(folder), "output_dir": str(tmp_path / "a"), "patient_regex": r"P\d", "assume_spacing": 0.1}
    (tmp_path / "c.json").write_text(json.dumps(settings))
    code, _, err = call("prepare", "--config", tmp_path / "c.json", "--assume-spacing", "0.2", "--output-dir", tmp_path / "b")
    assert code == 0, err
    assert not (tmp_path / "a").exists()
    assert set(read_manifest(tmp_path / "b/manifest.parquet")["pixel_spacing_mm"]) == {0.2}


def test_help_is_fast_and_imports_no_room():
    times = []
    for _ in range(4):
        start = time.perf_counter()
        done = subprocess.run([MAMMOSTREAM, "--help"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
    assert all(name in done.stdout for name in program.COMMANDS)
    code = """
import sys
from mammostream.cli import cli
cli.main(["--help"], standalone_mode=False)
print([m for m in ("torch", "numpy", "pandas", "scipy", "nvidia.dali", "matplotlib") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def commands(command, path=()):
    """Yield every command below a group with its words."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None, name
            yield from commands(found, (*path, name))


def test_every_help_names_every_option(call):
    seen = []
    for path, command in commands(program.cli):
        code, out, err = call(*path, "--help")
        assert (code, err) == (0, ""), path
        assert command.help, path
        seen.append(" ".join(path))
        text = " ".join(out.split())
        # As click prints it for this command: its own context knows the spelling and whether defaults are shown.
        context = click.Context(command, info_name="x", parent=click.Context(program.cli, **program.cli.context_settings))
        for param in command.params:
            if not isinstance(param, click.Option):
                continue
            assert len(param.help or "") > 5, (path, param.name)
            record = " ".join(param.get_help_record(context)[1].split())
            squeezed = "".join(record.split())  # a hyphen may end a line
            assert squeezed in "".join(text.split()), (path, param.name)
            assert param.opts[0] in out
            if param.required:
                assert "required]" in record, (path, param.name)
            elif (
                param.get_default(context) not in (None, (), [], False)
                and type(param.get_default(context)).__name__ != "Sentinel"
            ):
                assert "default" in record, (path, param.name)
    assert set(program.COMMANDS) < set(seen)
    expected = ("build", "finish", "verify", "info", "labels", "pack", "unpack")
    assert {f"shards {name}" for name in expected} < set(seen)
