"""The worst errors of an evaluation in the report: which films, in which order, with what the run has of them."""

from __future__ import annotations

import base64
import html
import io
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_report import Page, run_dir  # noqa: F401

from mammostream.common.files import write_yaml
from mammostream.train.report import report
from mammostream.train.report.errors import worst_errors
from mammostream.train.report.pictures import draw_tile_map


def titles_of(text: str) -> list[str]:
    return [html.unescape(title) for title in re.findall(r"<h3>(False (?:negative|positive), .*?)</h3>", text)]


@pytest.fixture
def judged(tmp_path, mammostream):
    """Forty films of two classes with random probabilities, evaluated; returns the run's folder, predictions and labels."""
    rng = np.random.default_rng(0)
    run = tmp_path / "run"
    (run / "infer").mkdir(parents=True)
    images = pd.DataFrame({"image_id": [f"film {i}" for i in range(40)], "patient_id": [f"p{i // 2}" for i in range(40)]})
    images["tiles"] = 3
    for name in ("mass", "specks"):
        for score in ("max", "top3", "noisy_or"):
            images[f"{score}:{name}"] = rng.random(40)
    images["reason"] = ""
    images.to_parquet(run / "infer/image_predictions.parquet")
    tiles = images[["image_id", "patient_id"]].assign(key=[f"f{i}_y0_x0" for i in range(40)])
    tiles.assign(**{"prob:mass": 0.5, "prob:specks": 0.5}).to_parquet(run / "infer/predictions.parquet")
    labels = images[["image_id"]].assign(mass=rng.integers(0, 2, 40).astype(float), specks=rng.integers(0, 2, 40))
    labels.loc[3, "mass"] = np.nan
    labels.to_csv(run / "labels.csv", index=False)
    evaluate = f"evaluate --predictions {run}/infer/image_predictions.parquet --labels {run}/labels.csv --bootstrap 10"
    outcome = mammostream(f"{evaluate} --threshold 0.4 --output-dir {run}/evaluate")
    assert outcome.code == 0, outcome.err
    return run, images, labels


def test_the_worst_films_of_each_class_and_kind_are_shown_in_order(judged, mammostream):
    run, images, labels = judged
    for option, limit in (("", 5), ("--errors 2", 2), ("--errors 100", 100)):
        assert mammostream(f"report {run} {option}").code == 0
        expected = []
        for name in ("mass", "specks"):
            joined = labels.assign(p=images[f"max:{name}"])
            missed = joined[(joined[name] == 1) & (joined["p"] < 0.4)].sort_values("p").head(limit)
            wrong = joined[(joined[name] == 0) & (joined["p"] >= 0.4)].sort_values("p", ascending=False).head(limit)
            for kind, films in (("negative", missed), ("positive", wrong)):
                expected += [
                    f"False {kind}, {name}: {image}, probability {p:.3f}, threshold 0.400"
                    for image, p in zip(films["image_id"], films["p"], strict=True)
                ]
        text = (run / "report.html").read_text()
        assert titles_of(text) == expected
        assert len(expected) > 4
        assert text.count("infer has no heat map of this film: infer draws them over films, not for shards") == len(expected)
    assert mammostream(f"report {run} --errors 0").code == 0
    assert "<h2>Errors" not in (run / "report.html").read_text()


def test_the_counts_are_those_of_all_films(judged):
    run, images, labels = judged
    counts = worst_errors(run / "evaluate", run, 1).counts.set_index("class")
    for name in ("mass", "specks"):
        positive, found = labels[name] == 1, images[f"max:{name}"] >= 0.4
        assert counts.loc[name, "false negatives"] == (positive & ~found).sum()
        assert counts.loc[name, "false positives"] == ((labels[name] == 0) & found).sum()
        assert counts.loc[name, "positive films"] == positive.sum()


def test_films_with_heat_maps_show_them_and_their_boxes(run_dir, finetuned, mammostream, tmp_path):  # noqa: F811
    """A real run: a film that is missed since no probability reaches 1, and one that is taken since each reaches 0."""
    run = tmp_path / "run"
    shutil.copytree(run_dir / "infer", run / "infer")
    images = pd.read_parquet(run / "infer/image_predictions.parquet").sort_values("image_id", ignore_index=True)
    labels = images[["image_id"]].assign(bright=[1.0, 0.0], simulated_calcification=np.nan)
    labels.to_csv(run / "labels.csv", index=False)
    tiles = pd.read_parquet(run / "infer/predictions.parquet")
    for threshold, kind, film in ((1, "False negative", images["image_id"][0]), (0, "False positive", images["image_id"][1])):
        shutil.rmtree(run / "evaluate", ignore_errors=True)
        # Tiles are judged, films are shown.
        outcome = mammostream(
            f"evaluate --predictions {run}/infer/predictions.parquet --labels {run}/labels.csv --threshold {threshold} "
            f"--bootstrap 0 --output-dir {run}/evaluate"
        )
        assert outcome.code == 0, outcome.err
        assert mammostream(f"report {run}").code == 0
        text = (run / "report.html").read_text()
        page = Page(text)
        score = images.loc[images["image_id"] == film, "max:bright"].iloc[0]
        (title,) = titles_of(text)
        assert title == f"{kind}, bright: {film}, probability {score:.3f}, threshold {threshold:.3f}"
        assert page.alternatives.count(title) == 1
        mine = tiles[tiles["image_id"] == film]
        top = mine.loc[mine["prob:bright"].idxmax()]
        said = " ".join(page.text)
        assert f"Highest of {len(mine)} tiles: {top['prob:bright']:.3f} (x {top['x']}, y {top['y']}, " in said
        # infer was given the boxes; they are of the other class.
        boxes = pd.read_parquet(finetuned.findings)
        boxes = boxes[boxes["image_id"] == film]
        assert said.count("simulated_calcification") >= len(boxes) > 0
        assert "Boxes on the film, in its pixels" in said
        assert all(f"{box.xmin:.4g}" in said for box in boxes.itertuples())


def test_films_of_shards_show_the_map_of_their_tiles(run_dir, finetuned, mammostream, tmp_path):  # noqa: F811
    """The same run without the pictures of infer: the map's hottest place lies where the highest tile is."""
    run = tmp_path / "run"
    shutil.copytree(run_dir / "infer", run / "infer", ignore=shutil.ignore_patterns("*.png"))
    images = pd.read_parquet(run / "infer/image_predictions.parquet")
    pd.DataFrame({"image_id": images["image_id"], "bright": 1.0}).to_csv(run / "labels.csv", index=False)
    evaluate = f"evaluate --predictions {run}/infer/image_predictions.parquet --labels {run}/labels.csv --bootstrap 0"
    assert mammostream(f"{evaluate} --threshold 1 --output-dir {run}/evaluate").code == 0
    assert mammostream(f"report {run}").code == 0
    text = (run / "report.html").read_text()
    page = Page(text)
    titles = titles_of(text)
    assert len(titles) == 2
    assert set(titles) <= set(page.alternatives)
    assert text.count("infer draws them over films, not for shards. This is the map of its tiles, without the film.") == 2


def test_the_map_of_tiles_is_hot_where_they_are_and_shows_boxes():
    """Four tiles that touch at their edges, the last one hot; a box on the first."""
    tiles = pd.DataFrame({"_x": [0, 100, 0, 100], "_y": [0, 0, 100, 100], "_size": 100})
    boxes = np.array([[20.0, 20, 60, 60]])
    for hot in range(4):
        picture = draw_tile_map(tiles, np.where(np.arange(4) == hot, 0.9, 0.1), boxes, "mass")
        with Image.open(io.BytesIO(base64.b64decode(picture.source.partition("base64,")[2]))) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        dark = (pixels.sum(2) < 200).any(0) & (np.arange(pixels.shape[1]) < 0.7 * pixels.shape[1])
        left, right = np.flatnonzero(dark)[[0, -1]]
        middle = pixels.shape[0] // 2, (left + right) // 2
        quarters = [pixels[: middle[0], left : middle[1]], pixels[: middle[0], middle[1] : right]]
        quarters += [pixels[middle[0] :, left : middle[1]], pixels[middle[0] :, middle[1] : right]]
        red = [np.median(quarter[..., 0]) for quarter in quarters]  # of the colours, red tells hot from cold
        assert int(np.argmax(red)) == hot, red
        cyan = (np.abs(pixels - [0x39, 0xD0, 0xFF]).sum(2) < 40).nonzero()
        assert len(cyan[0]) > 100
        assert cyan[0].max() < middle[0]
        assert cyan[1].max() < middle[1]


def test_boxes_say_which_tile_shows_them(run_dir, finetuned, tmp_path):  # noqa: F811
    """Against a search over all tiles; a box that lies on no tile is said to be on none."""
    run = tmp_path / "run"
    shutil.copytree(run_dir / "infer", run / "infer")
    (run / "evaluate").mkdir()
    images = pd.read_parquet(run / "infer/image_predictions.parquet")
    film = images["image_id"][0]
    name = "simulated_calcification"
    pd.DataFrame({"image_id": images["image_id"], name: 1.0}).to_csv(run / "labels.csv", index=False)
    boxes = pd.read_parquet(finetuned.findings)
    far = boxes.iloc[:1].assign(image_id=film, xmin=90000, xmax=90010, ymin=90000, ymax=90010)
    boxes = pd.concat([boxes, far], ignore_index=True)
    boxes.to_parquet(run / "findings.parquet")
    config = {"predictions": f"{run}/infer/image_predictions.parquet", "labels": f"{run}/labels.csv", "threshold": 1.0}
    write_yaml(run / "evaluate/config.yaml", config | {"findings": f"{run}/findings.parquet"})
    tiles = pd.read_parquet(run / "infer/predictions.parquet")
    tiles = tiles[tiles["image_id"] == film]
    found = next(case for case in worst_errors(run / "evaluate", run, 9).cases if film in case.title)
    expected = []
    for box in boxes[boxes["image_id"] == film].itertuples():
        width = np.minimum(tiles["x"] + tiles["size"], box.xmax) - np.maximum(tiles["x"], box.xmin)
        height = np.minimum(tiles["y"] + tiles["size"], box.ymax) - np.maximum(tiles["y"], box.ymin)
        overlap = width.clip(0) * height.clip(0)
        area = (box.xmax - box.xmin) * (box.ymax - box.ymin)
        hits = np.maximum(overlap / area, overlap / tiles["size"] ** 2) >= 0.5
        expected.append(f"{tiles.loc[hits, f'prob:{name}'].max():.3f}" if hits.any() else "no tile shows it")
    assert found.boxes[f"highest tile on it ({name})"].tolist() == expected
    assert expected[-1] == "no tile shows it"
    assert any(value[0] in "01" for value in expected)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("labels.csv", "labels {run}/labels.csv is not there any more"),
        ("infer/image_predictions.parquet", "predictions {run}/infer/image_predictions.parquet is not there any more"),
        ("evaluate/config.yaml", "the evaluation's config.yaml does not name its predictions"),
    ],
)
def test_what_is_gone_is_said(judged, mammostream, gone, said):
    run, *_ = judged
    (run / gone).unlink()
    assert mammostream(f"report {run}").code == 0
    text = html.unescape((run / "report.html").read_text())
    assert f"The worst errors are not shown: {said.format(run=run)}." in text
    assert not titles_of(text)


def test_a_run_that_was_moved_shows_its_own_files(judged, tmp_path, mammostream):
    run, *_ = judged
    assert mammostream(f"report {run}").code == 0
    titles = titles_of((run / "report.html").read_text())
    run.rename(tmp_path / "moved")
    assert mammostream(f"report {tmp_path}/moved").code == 0
    assert titles_of((tmp_path / "moved/report.html").read_text()) == titles


def test_evaluations_of_the_same_films_share_a_section(judged, mammostream):
    run, *_ = judged
    shutil.copytree(run / "evaluate", run / "evaluate_again")
    assert mammostream(f"report {run}").code == 0
    text = (run / "report.html").read_text()
    assert text.count("<h2>Errors") == 1
    assert text.count("<h2>Evaluation") == 2


def test_heat_maps_past_half_of_the_page_are_left_out(run_dir, mammostream, monkeypatch, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(run_dir / "infer", run / "infer")
    images = pd.read_parquet(run / "infer/image_predictions.parquet")
    pd.DataFrame({"image_id": images["image_id"], "bright": 1.0}).to_csv(run / "labels.csv", index=False)
    evaluate = f"evaluate --predictions {run}/infer/image_predictions.parquet --labels {run}/labels.csv --bootstrap 0"
    assert mammostream(f"{evaluate} --threshold 1 --output-dir {run}/evaluate").code == 0
    monkeypatch.setattr(report, "PICTURE_BYTES", 1000)
    assert mammostream(f"report {run}").code == 0
    text = (run / "report.html").read_text()
    assert len(titles_of(text)) == 2
    assert text.count(".png, is left out: the page is full.") == 2
