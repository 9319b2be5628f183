"""Films with the same pixels: hashes of what is decoded, flags of copies, a film of two patients stops the build."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mammostream.common.errors import BadInput
from mammostream.preprocess.reading import read_mammogram
from mammostream.shards.archive import read_index, sample_key
from mammostream.shards.build.film_tiles import pixels_hash
from mammostream.shards.build.verify import quarantine, verify_shards
from mammostream.shards.manifest import read_manifest, write_manifest
from mammostream.shards.reading import open_shards

OPTIONS = ["--tile-size", 64, "--stride", 48, "--images-per-shard", 2, "--workers", 1, "--device", "cpu"]


@pytest.fixture
def doubled(manifest, tmp_path, write_dicom):
    """The small films' manifest with the first film twice more, in other formats, and a blank film twice."""
    films = read_manifest(manifest)
    pixels = read_mammogram(films["path"][0]).pixels
    (tmp_path / "copy.jp2").write_bytes(imagecodecs.jpeg2k_encode(pixels, codecformat="jp2", reversible=True))
    write_dicom(tmp_path / "copy.dcm", pixels)
    Image.fromarray(np.zeros_like(pixels)).save(tmp_path / "blank.png")
    more = [
        films.iloc[[0]].assign(image_id=f"copy{n}", path=str(tmp_path / f"copy.{end}")) for n, end in enumerate(("jp2", "dcm"))
    ]
    for row in (0, 7):
        more.append(films.iloc[[row]].assign(image_id=f"blank{row}", path=str(tmp_path / "blank.png")))
    return pd.concat([films, *more], ignore_index=True)


def build(call, films, tmp_path, *more):
    write_manifest(films, tmp_path / "m.parquet")
    return call("shards", "build", "--manifest", tmp_path / "m.parquet", "--output-dir", tmp_path / "s", *OPTIONS, *more)


def test_hashes_tell_pixels_apart_and_nothing_else():
    pixels = np.arange(12, dtype=np.uint16).reshape(3, 4)
    assert pixels_hash(pixels) == pixels_hash(np.asfortranarray(pixels))
    others = [pixels.reshape(4, 3), pixels + 1, pixels.astype(np.uint8), pixels[:, ::-1]]
    assert len({pixels_hash(p) for p in [pixels, *others]}) == 5


def test_copies_are_flagged_with_what_they_equal_and_give_no_tiles(call, doubled, tmp_path, contents):
    code, out, err = build(call, doubled, tmp_path, "--max-bad", "50%")
    assert code == 0, err
    shards = open_shards(tmp_path / "s")
    images = shards.images().set_index("image_id")
    same = images[images["pixels_hash"] == images.loc["copy0", "pixels_hash"]]
    assert set(same.index) == {doubled["image_id"][0], "copy0", "copy1"}
    first, *rest = same.index  # in the order of the shards
    assert same.loc[first, "flags"] == ""
    for name in rest:
        assert same.loc[name, "flags"] == "duplicate"
        assert same.loc[name, "remarks"] == f"duplicate: has the pixels of {first}"
        assert f"duplicate: {name} has the pixels of {first}" in err
        assert same.loc[name, "kept"] == same.loc[name, "kept_both_rules"] == 0
        assert same.loc[name, "rejected_duplicate"] == same.loc[first, "kept"] > 0
    assert images["flags"].str.contains("duplicate").sum() == 2  # blank films give no tiles: they are copies of nothing
    assert images.loc["blank0", "pixels_hash"] == images.loc["blank7", "pixels_hash"]
    assert any(line.split() == ["duplicate", "2", "films"] for line in out.splitlines())
    assert pixels_hash(read_mammogram(doubled["path"][0]).pixels) == images.loc["copy1", "pixels_hash"]
    assert not images["lossy"].any()
    assert shards.tiles().groupby("image_id").size().to_dict() == images.loc[images["kept"] > 0, "kept"].to_dict()
    held = [sample_key(sample) for shard in shards.shards() for sample in read_index(shard.index)]
    assert sorted(held) == sorted(shards.tiles()["key"])
    # What the merge takes out is no fault, and a quarantine, a second merge and a second build change nothing.
    assert verify_shards(shards) == []
    before = contents(tmp_path / "s")
    quarantine(shards, [])
    call("shards", "finish", tmp_path / "s", "--max-bad", "50%")
    build(call, doubled, tmp_path, "--max-bad", "50%")
    assert contents(tmp_path / "s") == before
    code, out, _ = call("shards", "info", tmp_path / "s")
    assert code == 0
    assert any(line.split() == ["duplicate", "2", "films"] for line in out.splitlines())


def test_a_merge_that_was_killed_between_index_and_table_goes_on(call, doubled, tmp_path, contents):
    films = doubled[~doubled["image_id"].str.startswith("blank")]
    code, _, err = build(call, films, tmp_path, "--shard-range", "0:99")
    assert code == 0, err
    built = contents(tmp_path / "s")
    assert call("shards", "finish", tmp_path / "s")[0] == 0
    merged = contents(tmp_path / "s")
    changed = {name for name in built if merged[name] != built[name]}
    assert {name.rpartition(".")[2] for name in changed} == {"idx", "parquet"}
    for name in changed:  # the indexes are the new ones, the tables still the old
        if name.endswith(".parquet"):
            (tmp_path / "s" / name).write_bytes(built[name])
    for name in ("shards.json", "images.parquet", "tiles.parquet"):
        (tmp_path / "s" / name).unlink()
    assert call("shards", "finish", tmp_path / "s")[0] == 0
    assert contents(tmp_path / "s") == merged


def test_a_shard_of_copies_alone_has_no_tiles_left(call, manifest, tmp_path):
    films = read_manifest(manifest).head(1)
    films = pd.concat([films, films.assign(image_id="copy")], ignore_index=True)
    code, _, err = build(call, films, tmp_path, "--images-per-shard", 1)
    assert code == 0, err
    shards = open_shards(tmp_path / "s")
    assert sorted(entry["tiles"] > 0 for entry in shards.meta["shards"]) == [False, True]
    assert verify_shards(shards) == []
    assert call("shards", "info", tmp_path / "s")[0] == 0


def test_two_patients_with_one_film_stop_the_build_before_it_is_finished(call, doubled, tmp_path, contents):
    films = doubled[~doubled["image_id"].str.startswith("blank")].copy()
    films.loc[films["image_id"] == "copy1", ["patient_id", "split"]] = ["P1", "val"]
    code, out, err = build(call, films, tmp_path)
    assert code == 2, out
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "1 films of" in line
    assert "'copy1' of patient 'P1' (val)" in line
    assert "--allow-leakage" in line
    assert not (tmp_path / "s/shards.json").exists()
    with pytest.raises(BadInput, match="not a finished shard directory"):
        open_shards(tmp_path / "s")
    assert call("shards", "finish", tmp_path / "s")[0] == 2
    tars = {name: data for name, data in contents(tmp_path / "s").items() if name.endswith(".tar")}
    code, _, err = build(call, films, tmp_path, "--allow-leakage")
    assert code == 0, err
    # Only the merge was missing: nothing is built again.
    assert {name: data for name, data in contents(tmp_path / "s").items() if name.endswith(".tar")} == tars
    assert open_shards(tmp_path / "s").images()["rejected_duplicate"].gt(0).sum() == 2
    assert call("shards", "finish", tmp_path / "s")[0] == 2  # the copies that are out already still count


def test_ids_that_differ_in_zeros_only_are_one_patient(call, doubled, tmp_path):
    films = doubled[~doubled["image_id"].str.startswith("blank")].copy()
    films["patient_id"] = films["patient_id"].map({"P0": "7", "P1": "8"})
    films.loc[films["image_id"] == "copy1", "patient_id"] = "07"
    code, _, err = build(call, films, tmp_path)
    assert code == 0, err


def test_shard_ranges_leave_the_verdict_to_finish(call, doubled, tmp_path):
    films = doubled[~doubled["image_id"].str.startswith("blank")].copy()
    films.loc[films["image_id"] == "copy1", ["patient_id", "split"]] = ["P1", "val"]
    for part in ("0:2", "2:99"):
        code, _, err = build(call, films, tmp_path, "--shard-range", part)
        assert code == 0, err
    code, _, err = call("shards", "finish", tmp_path / "s")
    assert code == 2
    assert "with the same pixels" in err
    assert call("shards", "finish", tmp_path / "s", "--allow-leakage")[0] == 0
    assert open_shards(tmp_path / "s").images()["flags"].str.contains("duplicate").any()


def test_a_lossy_film_and_an_inverted_one_are_counted(call, manifest, tmp_path):
    films = read_manifest(manifest)
    pixels = read_mammogram(films["path"][0]).pixels
    grey = np.rint(pixels * (255 / pixels.max())).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "film.jpg", quality=90)
    Image.fromarray(pixels.max() - pixels).save(tmp_path / "inverted.png")
    films.loc[[0, 1], "path"] = [str(tmp_path / "film.jpg"), str(tmp_path / "inverted.png")]
    films.loc[1, ["laterality", "view"]] = films.loc[0, ["laterality", "view"]]
    code, out, err = build(call, films, tmp_path)
    assert code == 0, err
    images = open_shards(tmp_path / "s").images().set_index("image_id")
    assert images.loc[films["image_id"][0], "lossy"]
    assert images["lossy"].sum() == 1
    assert images.loc[films["image_id"][1], "flags"] == "inverted"
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "inverted 1 films" in lines
    assert "(compressed with loss) 1 films" in lines
