"""Contact sheets: the highest tiles of each class, highest first, with their own pixels, wherever the tiles come from."""

from __future__ import annotations

import shutil

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mammostream.dali_pipelines import LabelledLoader, create_inference_transform
from mammostream.shards import open_shards
from mammostream.train.predict import top_tiles
from mammostream.train.predict.config import InferConfig
from mammostream.train.predict.films import FilmInput, predict_film
from mammostream.train.predict.gradcam import grad_cam
from mammostream.train.predict.network import load_predictor
from mammostream.train.predict.top_tiles import (
    Cell,
    FilmTiles,
    TopTiles,
    draw_contact_sheet,
    draw_top_tiles,
    image_reader,
    shard_reader,
)


@pytest.fixture(scope="module")
def predictor(sharp_classifier):
    return load_predictor(sharp_classifier, InferConfig(device="cpu", num_workers=2, batch_size=8))


@given(st.lists(st.lists(st.tuples(*[st.integers(0, 9) | st.none()] * 2), max_size=8), max_size=5), st.integers(1, 4))
def test_the_highest_tiles_are_those_of_the_whole_table(parts, count):
    """However the tiles come in parts; equal ones in the table's order; those without a probability nowhere."""
    top, everything, key = TopTiles(["a", "b"], count), [], 0
    for part in parts:
        rows = []
        for a, b in part:
            known = a is not None and b is not None
            rows.append({"key": key, "prob:a": a if known else np.nan, "prob:b": b if known else np.nan})
            everything += [(key, a, b)] if known else []
            key += 1
        top.add(pd.DataFrame(rows, columns=["key", "prob:a", "prob:b"]))
    assert top.seen == len(everything)
    for place, name in ((1, "a"), (2, "b")):
        expected = [row[0] for row in sorted(everything, key=lambda row: (-row[place], row[0]))[:count]]
        found = top.of(name)
        assert (found["key"].tolist() if len(found) else []) == expected
    assert len(top.rows) <= 2 * count


# ---------------------------------------------------------------- tiles are read again as they were


def test_tiles_of_shards_are_read_by_key_in_the_rows_order(predictor, finetuned):
    shards = open_shards(finetuned.shards)
    tiles = shards.tiles()
    rows = tiles.sample(12, random_state=0).assign(part=lambda t: t["shard"])
    assert rows["part"].nunique() > 1
    found = shard_reader(predictor, shards)(rows)
    loader = LabelledLoader(shards.shards(), batch_size=16, tile_size=finetuned.tile_size, mean=0.449, std=0.226)
    by_number = {n: tile.clone() for batch, numbers in loader for n, tile in zip(numbers.tolist(), batch, strict=True)}
    torch.testing.assert_close(found, torch.stack([by_number[number] for number in rows["tile"]]))


def test_tile_images_are_read_in_the_rows_order(predictor, tmp_path):
    paths = []
    for i, edge in enumerate([32] * 9 + [48]):  # more than a batch, one of another size
        rows, columns = np.mgrid[:edge, :edge] / edge
        tile = np.rint((2 + np.sin(i + 3 * rows) + np.cos(i * columns)) / 4 * 65535).astype(np.uint16)
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(imagecodecs.png_encode(tile))
    rows = pd.DataFrame({"image_id": [str(path) for path in paths[::-1]]})
    transform = create_inference_transform(32, 0.449, 0.226)
    expected = [transform(imagecodecs.png_decode(path.read_bytes())) for path in paths[::-1]]
    # DALI's and torch's resizing differ a little at an image's edge.
    torch.testing.assert_close(image_reader(predictor)(rows), torch.stack(expected), atol=0.05, rtol=0)


def test_tiles_of_films_come_from_memory_or_from_the_film_again(predictor, finetuned, monkeypatch, tmp_path):
    """Films of an earlier run of a resumed prediction, or of another process, are not in memory."""
    films = [FilmInput(path, path.stem, (0, 0), spacing_mm=0.2) for path in sorted(finetuned.films.iterdir())]
    kept, fresh, tables = FilmTiles(predictor, films, 4), FilmTiles(predictor, films, 4), []
    for film_input in films:
        film, tiles = predict_film(predictor, film_input)
        kept.keep(film, tiles)
        tables.append(tiles)
    assert len(kept._pixels) <= 8  # four a class, however many films
    top = TopTiles(predictor.class_names, 4)
    for tiles in tables:
        top.add(tiles)
    expected = fresh(top.rows)
    # What the network says of what was read is what the table says.
    probabilities = predictor.probabilities(expected)
    np.testing.assert_allclose(probabilities, top.rows[["prob:simulated_calcification", "prob:bright"]], atol=1e-5)
    monkeypatch.setattr(top_tiles, "PreparedFilms", None)  # nothing is read again
    torch.testing.assert_close(kept(top.rows), expected)


# ---------------------------------------------------------------- the picture


def test_a_sheet_shows_tiles_in_order_in_rows_of_six(tmp_path):
    greys = np.linspace(0.95, 0.2, 8)
    cells = [Cell(np.full((16, 16), grey), [f"{grey:.3f}", "film " * 40, "x 0, y 0"]) for grey in greys]
    draw_contact_sheet(cells, tmp_path / "sheet.png", "title " * 100, "note")
    picture = imagecodecs.png_decode((tmp_path / "sheet.png").read_bytes()).astype(int)
    width, height = top_tiles._CELL + top_tiles._GAP, top_tiles._CELL + top_tiles._CAPTION + top_tiles._GAP
    assert picture.shape == (2 * height + top_tiles._HEADING, 6 * width + top_tiles._GAP, 3)
    middles = [picture[top_tiles._HEADING + i // 6 * height + 128, top_tiles._GAP + i % 6 * width + 128, 0] for i in range(8)]
    np.testing.assert_allclose(middles, greys * 255, atol=1)
    assert (picture[top_tiles._HEADING + top_tiles._CELL + 2 :][:54, :width].min(-1) < 128).any()  # the lines below
    gaps = picture[top_tiles._HEADING :, width : width + top_tiles._GAP]
    assert gaps.min() == 255  # long names end before the next tile


def test_the_evidence_lies_over_a_second_picture_of_the_tile(tmp_path):
    evidence = np.zeros((16, 16))
    evidence[:8, 8:] = 1
    draw_contact_sheet([Cell(np.full((16, 16), 0.5), ["1.000"], evidence)], tmp_path / "sheet.png", "title")
    picture = imagecodecs.png_decode((tmp_path / "sheet.png").read_bytes()).astype(int)
    top, left, size = top_tiles._HEADING, top_tiles._GAP, top_tiles._CELL
    tile, overlaid = (picture[top + offset : top + offset + size, left : left + size] for offset in (0, size))
    assert np.ptp(tile) == 0
    changed = np.abs(overlaid - tile).max(-1) > 40
    assert changed[:100, 156:].all()
    assert not changed[156:].any()
    assert not changed[:, :100].any()


def test_a_class_gets_its_own_sheet_with_its_own_evidence(predictor, finetuned, tmp_path, monkeypatch):
    shards = open_shards(finetuned.shards)
    read = shard_reader(predictor, shards)
    tiles = shards.tiles().assign(part=lambda t: t["shard"], reason="")
    scores = predictor.probabilities(read(tiles))
    for c, name in enumerate(predictor.class_names):
        tiles[f"prob:{name}"] = scores[:, c]
    top = TopTiles(predictor.class_names, 10)
    top.add(tiles)
    drawn = {}
    monkeypatch.setattr(top_tiles, "draw_contact_sheet", lambda cells, path, *_: drawn.__setitem__(path.stem, cells))
    draw_top_tiles(predictor, top, read, tmp_path, with_grad_cam=True)
    assert list(drawn) == ["top_tiles_simulated_calcification", "top_tiles_bright"]
    for c, (name, cells) in enumerate(zip(predictor.class_names, drawn.values(), strict=True)):
        best = tiles.nlargest(10, f"prob:{name}", keep="first")
        assert [cell.lines[0] for cell in cells] == [f"{p:.3f}" for p in best[f"prob:{name}"]]
        assert [cell.lines[1] for cell in cells] == best["image_id"].tolist()
        assert cells[0].lines[2] == f"x {best['x'].iloc[0]}, y {best['y'].iloc[0]}, {best['size'].iloc[0]} px"
        pixels = read(best)
        for i in (0, 9):  # more than one batch
            np.testing.assert_allclose(cells[i].picture, pixels[i, 0] * 0.226 + 0.449, atol=1e-5)
            np.testing.assert_allclose(cells[i].evidence, grad_cam(predictor.model, pixels[i : i + 1], c)[0], atol=1e-4)


def test_infer_draws_sheets_of_shards_films_and_tile_images(sharp_classifier, finetuned, run_cli, mammostream, tmp_path):
    infer = f"infer --model-path {sharp_classifier} --device cpu"
    run_cli(
        f"infer --model-path {sharp_classifier} --device cpu --shards {finetuned.shards} --output-dir {tmp_path}/s --grad-cam"
    )
    run_cli(f"shards unpack {finetuned.shards} --output-dir {tmp_path}/tiles")
    run_cli(f"{infer} --images-dir {tmp_path}/tiles --output-dir {tmp_path}/t --sheet-tiles 30")
    run_cli(f"{infer} --images-dir {tmp_path}/tiles --output-dir {tmp_path}/n --sheet-tiles 0")
    names = {"top_tiles_simulated_calcification.png", "top_tiles_bright.png"}
    sheets = {folder: {path.name for path in (tmp_path / folder).glob("*.png")} for folder in "stn"}
    assert sheets == {"s": names, "t": names, "n": set()}
    shapes = {f: imagecodecs.png_decode((tmp_path / f / "top_tiles_bright.png").read_bytes()).shape[0] for f in "st"}
    assert shapes["s"] > shapes["t"]  # each tile twice, with Grad-CAM
    shutil.rmtree(tmp_path / "tiles")
    for line, expected in (
        (f"--shards {finetuned.shards} --output-json {tmp_path}/a.json --grad-cam", "--grad-cam draws on contact sheets"),
        (f"--shards {finetuned.shards} --output-dir {tmp_path}/b --grad-cam --sheet-tiles 0", "--grad-cam draws on"),
    ):
        outcome = mammostream(f"{infer} {line}")
        assert outcome.code == 2
        assert expected in outcome.error
