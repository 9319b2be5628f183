"""Inference: one answer by every way to it, whole tables where films fail, and refusals of what the model does not know."""

from __future__ import annotations

import json
import shutil

import imagecodecs
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mammostream.common.files import sha256_file
from mammostream.models.checkpoints import load_checkpoint, save_checkpoint
from mammostream.shards import open_shards
from mammostream.shards.archive import read_index
from mammostream.shards.codecs import decode
from mammostream.train.levels.aggregation import Groups, aggregate


def table(folder, name="predictions"):
    return pd.read_parquet(folder / f"{name}.parquet")


def assert_same_probabilities(one, other, classes, tolerance=1e-3):
    """The same keys and, by key, the same probabilities; a network that says one thing everywhere proves nothing."""
    assert len(one) == len(other) > 30
    one, other = (frame.set_index("key").sort_index() for frame in (one, other))
    assert one.index.is_unique
    assert one.index.tolist() == other.index.tolist()
    for name in classes:
        column = f"prob:{name}"
        assert one[column].std() > 0.1
        assert one[column].between(0, 1).all()
        np.testing.assert_allclose(one[column], other[column], atol=tolerance)


@pytest.fixture(scope="module")
def from_shards(sharp_classifier, finetuned, run_cli, tmp_path_factory):
    """The tables of the simulated films' shards."""
    folder = tmp_path_factory.mktemp("from_shards")
    run_cli(f"infer --model-path {sharp_classifier} --shards {finetuned.shards} --output-dir {folder} --device cpu")
    return folder


# ---------------------------------------------------------------- one answer by every way


def test_shards_and_raw_dicom_films_agree(sharp_classifier, finetuned, run_cli, tmp_path):
    """Decoding, mapping, resampling, selection, cutting, rounding, normalising: twice the same, from one record."""
    run_cli(f"shards build --manifest {finetuned.film_manifest} --output-dir {tmp_path}/shards {finetuned.tiling}")
    predict = f"infer --model-path {sharp_classifier} --device cpu --batch-size 7"
    run_cli(f"{predict} --shards {tmp_path}/shards --output-dir {tmp_path}/a")
    run_cli(f"{predict} --images-dir {finetuned.films} --assume-spacing 0.2 --output-dir {tmp_path}/b")
    one, other = table(tmp_path / "a"), table(tmp_path / "b")
    assert set(one["image_id"]) == {"1-130", "1-280"}
    assert_same_probabilities(one, other, finetuned.classes)
    one, other = (frame.set_index("key").sort_index() for frame in (one, other))
    pd.testing.assert_frame_equal(one[["image_id", "x", "y", "size"]], other[["image_id", "x", "y", "size"]], check_dtype=False)


def test_shards_and_a_manifests_films_agree(sharp_classifier, finetuned, from_shards, run_cli, tmp_path):
    run_cli(f"infer --model-path {sharp_classifier} --device cpu --manifest {finetuned.manifest} --output-dir {tmp_path}")
    assert_same_probabilities(table(from_shards), table(tmp_path), finetuned.classes)
    for name in ("image_predictions", "breast_predictions"):
        one, other = table(from_shards, name), table(tmp_path, name)
        keys = [c for c in ("image_id", "patient_id", "laterality") if c in one.columns]
        one, other = (frame.sort_values(keys, ignore_index=True) for frame in (one, other))
        assert len(one) == 2
        shared = [*keys, "tiles", *(f"{kind}:{c}" for kind in ("max", "top3") for c in finetuned.classes)]
        pd.testing.assert_frame_equal(one[shared], other[shared], atol=1e-3)
    pictures = {path.name for path in tmp_path.glob("heatmap_*.png")}
    films = ("1-130_simulated0", "1-280_simulated0")
    assert pictures == {f"heatmap_{film}_{name}.png" for film in films for name in finetuned.classes}


def test_dicom_films_of_a_folder_tell_their_breasts(sharp_classifier, finetuned, run_cli, tmp_path):
    """As with a manifest: the patient, side and view of their headers."""
    predict = f"infer --model-path {sharp_classifier} --device cpu --sheet-tiles 0 --assume-spacing 0.2"
    run_cli(f"{predict} --images-dir {finetuned.films} --output-dir {tmp_path}/folder")
    run_cli(f"{predict} --manifest {finetuned.film_manifest} --output-dir {tmp_path}/manifest")
    breasts, expected = (table(tmp_path / name, "breast_predictions") for name in ("folder", "manifest"))
    keys = ["patient_id", "laterality"]
    assert sorted(breasts["patient_id"]) == ["P_00173", "P_00820"]  # of 'Mass-Test_P_00173_LEFT_CC'
    pd.testing.assert_frame_equal(*(frame.sort_values(keys, ignore_index=True) for frame in (breasts, expected)))
    assert table(tmp_path / "folder", "image_predictions")["view"].tolist() == ["CC", "CC"]


def test_shards_and_tiles_as_images_agree(sharp_classifier, finetuned, from_shards, mammostream, tmp_path):
    for shard in open_shards(finetuned.shards).shards():
        data = shard.tar.read_bytes()
        for sample in read_index(shard.index):
            tile = next(member for member in sample if member.extension == "tif")
            pixels = decode(data[tile.offset : tile.offset + tile.size], "tif")
            (tmp_path / tile.name.replace(".tif", ".png")).write_bytes(imagecodecs.png_encode(pixels))
    outcome = mammostream(
        f"infer --model-path {sharp_classifier} --device cpu --images-dir {tmp_path} --output-dir {tmp_path}/out"
    )
    assert outcome.code == 0
    assert "treated as tiles" in outcome.err
    assert_same_probabilities(table(from_shards), table(tmp_path / "out"), finetuned.classes, 1e-5)


def test_the_batch_size_changes_nothing(sharp_classifier, finetuned, from_shards, run_cli, tmp_path):
    run_cli(
        f"infer --model-path {sharp_classifier} --shards {finetuned.shards} --split val --output-dir {tmp_path} --device cpu "
        "--batch-size 5"
    )
    tiles = table(from_shards)
    assert_same_probabilities(tiles[tiles["split"] == "val"], table(tmp_path), finetuned.classes, 1e-5)


# ---------------------------------------------------------------- tables and JSON


def test_the_tables_name_model_and_preprocessing(sharp_classifier, finetuned, from_shards):
    tiles = table(from_shards)
    truth = open_shards(finetuned.shards).tiles().sort_values("tile")
    columns = ["key", "image_id", "patient_id", "split", "x", "y", "size"]
    pd.testing.assert_frame_equal(tiles[columns], truth[columns].reset_index(drop=True))
    for name in ("predictions", "image_predictions", "breast_predictions"):
        facts = json.loads(pq.read_schema(from_shards / f"{name}.parquet").metadata[b"mammostream"])
        assert facts["model_sha256"] == sha256_file(sharp_classifier)
        assert facts["preprocessing"]["tile_size"] == finetuned.tile_size
    images = table(from_shards, "image_predictions").set_index("image_id")
    for image_id, rows in tiles.groupby("image_id"):
        for name in finetuned.classes:
            scores = np.sort(rows[f"prob:{name}"])
            assert images.loc[image_id, f"max:{name}"] == pytest.approx(scores[-1])
            assert images.loc[image_id, f"top3:{name}"] == pytest.approx(scores[-3:].mean())
        assert images.loc[image_id, "tiles"] == len(rows)


def test_aggregates_are_the_highest_tile_and_the_mean_of_three():
    tiles = pd.DataFrame(
        {
            "image_id": ["a"] * 5 + ["b"] * 2,
            "patient_id": ["p"] * 5 + [None] * 2,
            "prob:mass": [0.1, 0.9, 0.5, 0.7, 0.2, 0.4, 0.6],
            "prob:calc": [0.3, 0.3, 0.3, 0.0, 0.0, 1.0, 0.0],
        }
    )
    images = aggregate(tiles, ["image_id", "patient_id"])
    assert images["image_id"].tolist() == ["a", "b"]  # a group without a patient is a group
    assert images["tiles"].tolist() == [5, 2]
    np.testing.assert_allclose(images["max:mass"], [0.9, 0.6])
    np.testing.assert_allclose(images["top3:mass"], [0.7, 0.5])
    np.testing.assert_allclose(images["max:calc"], [0.3, 1.0])
    np.testing.assert_allclose(images["top3:calc"], [0.3, 0.5])
    np.testing.assert_allclose(images["noisy_or:mass"], [1 - 0.9 * 0.1 * 0.5 * 0.3 * 0.8, 1 - 0.6 * 0.4])
    np.testing.assert_allclose(images["noisy_or:calc"], [1 - 0.7**3, 1.0])
    scores = [f"{kind}:{name}" for name in ("mass", "calc") for kind in ("max", "top3", "noisy_or")]
    assert images.columns.tolist() == ["image_id", "patient_id", "tiles", *scores]


@settings(max_examples=20)
@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1)), max_size=12), max_size=5), st.integers(1, 5))
def test_aggregates_do_not_depend_on_how_tiles_come_in_parts(parts, top):
    frames = [pd.DataFrame(part, columns=["image_id", "prob:mass"]).astype({"prob:mass": float}) for part in parts]
    groups = Groups(["image_id"], ["mass"], top)
    for frame in frames:
        groups.add(frame)
    whole = pd.concat([pd.DataFrame({"image_id": [], "prob:mass": []}), *frames])
    table = groups.table()
    pd.testing.assert_frame_equal(table, aggregate(whole, ["image_id"], top), check_dtype=False)
    for row in table.to_dict("records"):
        p = whole.loc[whole["image_id"] == row["image_id"], "prob:mass"]
        assert row["tiles"] == len(p)
        assert row["max:mass"] == p.max()
        assert row[f"top{top}:mass"] == pytest.approx(p.nlargest(top).mean())
        assert row["noisy_or:mass"] == pytest.approx(1 - (1 - p).prod())


def test_json_and_screen_of_one_film(sharp_classifier, finetuned, mammostream, tmp_path):
    film = finetuned.films / "1-280.dcm"
    predict = f"infer --model-path {sharp_classifier} --device cpu --image-path {film} --assume-spacing 0.2"
    scores = {}
    for threshold in (0.0, 1.0):
        outcome = mammostream(f"{predict} --threshold {threshold} --output-json {tmp_path}/out.json")
        assert outcome.code == 0
        answer = json.loads((tmp_path / "out.json").read_text())
        assert answer["thresholds"] == dict.fromkeys(finetuned.classes, threshold)
        assert answer["class_names"] == finetuned.classes
        (image,) = answer["images"]
        scores = image["probabilities"]
        assert image["image"] == "1-280"
        assert sorted(scores) == sorted(finetuned.classes)
        assert image["top_prediction"] == max(scores, key=scores.get)
        assert image["tiles"] > 30
        assert sorted(image["positive"]) == (sorted(finetuned.classes) if threshold == 0 else [])
        assert outcome.out.count("✅" if threshold == 0 else "❌") == 2
    assert f"Top prediction: {image['top_prediction']} ({scores[image['top_prediction']]:.3f})" in outcome.out


# ---------------------------------------------------------------- what fails, and how


def test_one_bad_film_is_a_row_with_its_reason_and_the_rest_goes_on(sharp_classifier, finetuned, mammostream, tmp_path):
    shutil.copy(finetuned.films / "1-280.dcm", tmp_path / "good.dcm")
    (tmp_path / "broken.dcm").write_bytes(b"this is no film")
    (tmp_path / "cut.dcm").write_bytes((finetuned.films / "1-130.dcm").read_bytes()[:200_000])
    outcome = mammostream(
        f"infer --model-path {sharp_classifier} --device cpu --images-dir {tmp_path} --assume-spacing 0.2 "
        f"--output-dir {tmp_path}/out --output-json {tmp_path}/out.json"
    )
    assert outcome.code == 3  # two of three are more than --max-bad 5%; the tables are there all the same
    assert "2 of 3 films failed, more than --max-bad 5%" in outcome.error
    images = table(tmp_path / "out", "image_predictions").set_index("image_id")
    assert images.loc["good", "reason"] == ""
    assert images.loc["good", "tiles"] > 30
    records = {record["image"]: record for record in json.loads((tmp_path / "out.json").read_text())["images"]}
    assert "probabilities" in records["good"]
    for name in ("broken", "cut"):
        assert f"{name}.dcm" in images.loc[name, "reason"]
        assert records[name] == {"image": name, "error": images.loc[name, "reason"]}
        assert f"failed: {name}: " in outcome.err
    assert set(table(tmp_path / "out")["image_id"]) == {"good"}
    assert "1 images, 2 images failed" in outcome.out


def test_a_folder_is_searched_as_prepare_searches_it(sharp_classifier, finetuned, mammostream, tmp_path):
    """DICOM without an ending, JPEG, links where asked for; other objects of an export are counted, not failed."""
    source = finetuned.films / "1-280.dcm"
    (tmp_path / "in").mkdir()
    shutil.copy(source, tmp_path / "in/IM000001")
    film = pydicom.dcmread(source)
    grey = np.rint(film.pixel_array * (255 / film.pixel_array.max())).astype(np.uint8)
    (tmp_path / "in/film.JPG").write_bytes(imagecodecs.jpeg8_encode(grey, level=95))
    film.Modality, film.SOPClassUID = "US", "1.2.840.10008.5.1.4.1.1.6.1"
    film.save_as(tmp_path / "in/IM000002")
    (tmp_path / "in/DICOMDIR").write_bytes((tmp_path / "in/IM000001").read_bytes())
    (tmp_path / "more").mkdir()
    shutil.copy(source, tmp_path / "more/linked.dcm")
    (tmp_path / "in/more").symlink_to(tmp_path / "more")
    predict = f"infer --model-path {sharp_classifier} --device cpu --images-dir {tmp_path}/in --assume-spacing 0.2"
    for more, expected in (("", {"IM000001", "film"}), (" --follow-links", {"IM000001", "film", "linked"})):
        outcome = mammostream(f"{predict} --output-json {tmp_path}/out.json{more}")
        assert outcome.code == 0, outcome.err
        assert {record["image"] for record in json.loads((tmp_path / "out.json").read_text())["images"]} == expected
        assert "1 DICOM files are no mammograms and are left out: 1 US" in outcome.err


def test_a_single_bad_film_ends_with_an_error(sharp_classifier, mammostream, tmp_path):
    for name in ("broken.dcm", "broken.png"):
        (tmp_path / name).write_bytes(b"this is no film")
        outcome = mammostream(f"infer --model-path {sharp_classifier} --device cpu --image-path {tmp_path / name}")
        assert outcome.code == 2
        assert name in outcome.error
    blank = tmp_path / "blank.png"
    blank.write_bytes(imagecodecs.png_encode(np.zeros((800, 600), np.uint16)))
    outcome = mammostream(f"infer --model-path {sharp_classifier} --device cpu --image-path {blank} --assume-spacing 0.2")
    assert outcome.code == 2
    assert "no tile passed" in outcome.error
    # A folder with nothing but bad films has nothing to predict.
    outcome = mammostream(
        f"infer --model-path {sharp_classifier} --device cpu --images-dir {tmp_path} --images-are films --assume-spacing 0.2 "
        f"--output-dir {tmp_path}/out"
    )
    assert outcome.code == 2


def test_shards_of_other_tiles_are_refused(sharp_classifier, finetuned, run_cli, mammostream, tmp_path):
    options = {"tile_size": "--pixel-spacing 0.4 --tile-size 48", "pixel_spacing_mm": "--pixel-spacing 0.5 --tile-size 32"}
    for name, tiling in options.items():
        run_cli(
            f"shards build --manifest {finetuned.manifest} --split val --output-dir {tmp_path}/{name} {tiling} --stride 96 "
            "--device cpu"
        )
        outcome = mammostream(
            f"infer --model-path {sharp_classifier} --device cpu --shards {tmp_path}/{name} --output-dir {tmp_path}/out"
        )
        assert outcome.code == 2
        assert f"the model learnt from tiles with {name} " in outcome.error
    assert not (tmp_path / "out").exists()


def test_films_of_other_or_unknown_pixels_are_refused(sharp_classifier, finetuned, mammostream, tmp_path):
    film = finetuned.films / "1-280.dcm"
    predict = f"infer --device cpu --image-path {film}"
    outcome = mammostream(f"{predict} --model-path {sharp_classifier}")
    assert outcome.code == 2
    assert "has no pixel spacing, and the model needs it; give --assume-spacing" in outcome.error

    # A model of native pixels takes films of its own pixel size, within 1.25 times, and no others.
    checkpoint = load_checkpoint(sharp_classifier, "classifier")
    checkpoint["preprocessing"] |= {"pixel_spacing_mm": None, "native_spacing_mm": [0.1, 0.1], "tile_size": 128}
    checkpoint["preprocessing"] |= {"stride": 256, "max_tiles_per_image": 2}
    save_checkpoint(tmp_path / "native.pth", checkpoint)
    for spacing, code in ((0.2, 2), (0.06, 2), (0.12, 0)):
        outcome = mammostream(f"{predict} --model-path {tmp_path}/native.pth --assume-spacing {spacing}")
        assert outcome.code == code, outcome.err
        if code:
            assert f"has pixels of {spacing:g} mm, the model learnt from 0.1 to 0.1 mm" in outcome.error
    assert "2 tiles of 1 images" in outcome.out  # the record's limit


def test_half_precision_stays_close(sharp_classifier, finetuned, from_shards, run_cli, tmp_path):
    run_cli(
        f"infer --model-path {sharp_classifier} --shards {finetuned.shards} --output-dir {tmp_path} --device cpu "
        "--precision bf16"
    )
    assert_same_probabilities(table(from_shards), table(tmp_path), finetuned.classes, 0.05)
    one, other = table(from_shards), table(tmp_path)
    assert (one["prob:bright"] != other["prob:bright"]).any()
