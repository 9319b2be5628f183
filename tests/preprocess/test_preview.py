"""Pictures of films: that every mark is where it belongs, that odd films are drawn too, and that overviews are true."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from dicom_files import write_dicom
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from mammostream.common.errors import BadInput
from mammostream.preprocess.overview import (
    FilmPicture,
    PictureJob,
    _energy_percentiles,
    draw_picture,
    draw_pictures,
    summary_lines,
    write_contact_sheets,
    write_energies,
)
from mammostream.preprocess.preview import (
    CLUSTER_COLOUR,
    CONTOUR_COLOUR,
    ENERGY_EDGES,
    FILM_PANEL,
    PECTORAL_COLOUR,
    RULE_COLOURS,
    _draw_titles,
    draw_film,
    energy_counts,
)
from mammostream.preprocess.reading import Header, Mammogram
from mammostream.preprocess.simulation import ClusterConfig, plant_clusters
from mammostream.preprocess.tiling import TilingConfig, tile_film

SPACING = 0.2
CONFIG = TilingConfig(tile_size=128, stride=64)
# Large specks: these films have 0.2 mm pixels.
NEAR_SKIN = ClusterConfig(
    contrast=20, min_speck_mm=0.5, max_speck_mm=0.7, skin_distance_mm=3, max_skin_distance_mm=8, max_cluster_mm=6
)


def tiled(pixels, config=CONFIG, spacing=SPACING):
    return tile_film(Mammogram(pixels, Header(*pixels.shape, bits=16, spacing_mm=spacing)), config)


@pytest.fixture(scope="module")
def planted(films):
    """A film with simulated clusters near the skin, and their boxes."""
    return plant_clusters(films[2].pixels, SPACING, NEAR_SKIN, seed=1)


def film_panel(path):
    """Return the left panel of a picture, (h, w, 3)."""
    left, bottom, width, height = FILM_PANEL
    with Image.open(path) as image:
        rgb = np.asarray(image.convert("RGB"))
    rows, columns = rgb.shape[:2]
    return rgb[
        round((1 - bottom - height) * rows) : round((1 - bottom) * rows),
        round(left * columns) : round((left + width) * columns),
    ]


def where(panel, colour):
    """Return rows and columns of the pixels of a colour."""
    return np.nonzero((panel == np.rint(np.array(to_rgb(colour)) * 255)).all(axis=2))


def test_marks_lie_where_they_belong(planted, tmp_path):
    pixels, boxes = planted
    film = tiled(pixels)
    rescues = film.tiles.take(film.selection.rule == "rescue")
    assert len(rescues.x) >= 1
    assert {"breast", "both"} <= set(film.selection.rule)
    draw_film(film, 128, tmp_path / "with.png", "a film", boxes)
    panel = film_panel(tmp_path / "with.png")
    height, width = film.image.shape
    # The film fills its panel in one direction and lies in the middle of the other.
    scale = min(panel.shape[0] / height, panel.shape[1] / width)
    left, top = (panel.shape[1] - width * scale) / 2, (panel.shape[0] - height * scale) / 2

    def extent(colour):
        rows, columns = where(panel, colour)
        return np.array([columns.min() - left, rows.min() - top, columns.max() - left, rows.max() - top]) / scale

    near = 4 / scale  # pixels of the picture: a line's width and rounding
    expected = [rescues.x.min(), rescues.y.min(), rescues.x.max() + 128, rescues.y.max() + 128]
    np.testing.assert_allclose(extent(RULE_COLOURS["rescue"]), expected, atol=near)
    found = film.selection.clusters
    np.testing.assert_allclose(
        extent(CLUSTER_COLOUR), [*found[:, :2].min(axis=0), *found[:, 2:].max(axis=0)], atol=2 * near
    )  # dashes
    rows, columns = (np.flatnonzero(film.segmentation.mask.any(axis=axis)) for axis in (1, 0))
    factor = film.segmentation.factor
    breast = [columns[0] * factor, rows[0] * factor, (columns[-1] + 1) * factor, (rows[-1] + 1) * factor]
    # The line stops at the film's edge, where the breast continues.
    np.testing.assert_allclose(extent(CONTOUR_COLOUR), breast, atol=2 * near)
    for colour in (RULE_COLOURS["breast"], RULE_COLOURS["both"]):
        assert len(where(panel, colour)[0]) > 20

    without = tiled(pixels, replace(CONFIG, cluster_specks=0, select="breast"))
    draw_film(without, 128, tmp_path / "without.png", "a film")
    panel = film_panel(tmp_path / "without.png")
    for colour in (RULE_COLOURS["rescue"], CLUSTER_COLOUR):
        assert len(where(panel, colour)[0]) == 0

    # A box is in native pixels; nothing else changes.
    draw_film(without, 128, tmp_path / "boxed.png", "a film", [(20, 700, 320, 1000)])
    rows, columns = np.nonzero((film_panel(tmp_path / "boxed.png") != panel).any(axis=2))
    changed = np.array([columns.min() - left, rows.min() - top, columns.max() - left, rows.max() - top]) / scale
    np.testing.assert_allclose(changed, [20, 700, 320, 1000], atol=near)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((1, 1), np.uint8),
        np.full((200, 100), 255, np.uint8),
        np.zeros((600, 400), np.uint16),
        np.full((3, 900), 7, np.uint16),
        np.random.default_rng(0).integers(0, 65535, (700, 500), dtype=np.uint16),
    ],
    ids=["1x1", "white", "black", "flat", "noise"],
)
@pytest.mark.parametrize("spacing", [0.1, None])
def test_odd_films_are_drawn(pixels, spacing, tmp_path):
    film = tiled(pixels, spacing=spacing)
    draw_film(film, 128, tmp_path / "odd.png", "a $film_{ with \\odd name")
    with Image.open(tmp_path / "odd.png") as picture:
        assert picture.size == (1200, 756)
    assert energy_counts(film.selection).sum() == sum(~np.isin(film.selection.fate, ["intensity", "nonzero"]))


@pytest.fixture
def job(films, tmp_path):
    """A job for a film at 0.4 mm in a PNG."""
    image = tmp_path / "in" / "film.png"
    image.parent.mkdir()
    Image.fromarray(np.ascontiguousarray(films[0].pixels[::2, ::2])).save(image)
    return PictureJob("film", image, tmp_path / "out" / "film.png", 0.4, "assumed", films[0].side)


SMALL = TilingConfig(tile_size=64, stride=32)


def test_drawn_once_and_again_only_for_a_reason(job):
    first = draw_picture(job, SMALL)
    assert first.reason == ""
    assert first.counts["kept"] > 5
    assert first.flags == ()

    def drawn(changed=job, config=SMALL, overwrite=False):
        os.utime(job.picture, ns=(1, 1))
        result = draw_picture(changed, config, overwrite)
        return result, job.picture.is_file() and job.picture.stat().st_mtime_ns != 1

    assert drawn() == (first, False)
    assert drawn(overwrite=True) == (first, True)
    strict, again = drawn(config=replace(SMALL, min_intensity=120))
    assert again
    assert strict.counts["kept"] < first.counts["kept"]
    other = replace(job, laterality="L" if job.laterality == "R" else "R")
    assert drawn(other)[0].flags == ("side_disagrees",)
    assert drawn(replace(other, boxes=((1, 2, 30, 40),)))[1]
    assert drawn(replace(job, view="CC"))[1]
    job.image.write_bytes(job.image.read_bytes()[:5000])
    broken, _ = drawn()
    assert "film.png cannot be read" in broken.reason
    assert not job.picture.exists()
    assert draw_picture(replace(job, image=job.image.with_name("gone.png")), SMALL).reason.endswith("check the path")


def test_some_other_picture_is_replaced(job):
    job.picture.parent.mkdir()
    Image.new("L", (9, 9)).save(job.picture)
    assert draw_picture(job, SMALL).counts["kept"] > 5


def test_frames_are_read_where_asked_for(films, job):
    small = np.ascontiguousarray(films[0].pixels[::2, ::2])
    path = job.image.with_suffix(".dcm")
    write_dicom(path, np.stack([np.zeros_like(small), small]), bits=16, NumberOfFrames=2)
    job = replace(job, image=path)
    assert "2 frames" in draw_picture(job, SMALL).reason
    assert draw_picture(job, replace(SMALL, frame=1)).flags == ("no_breast",)
    assert draw_picture(job, replace(SMALL, frame=2)).counts["kept"] > 5


def test_several_workers_draw_the_same_in_order(job):
    jobs = [replace(job, image_id=name, picture=job.picture.with_name(f"{name}.png")) for name in "cab"]
    jobs[1] = replace(jobs[1], image=job.image.with_name("gone.png"))
    alone = list(draw_pictures(jobs, SMALL, overwrite=True))
    pictures = [p.path.read_bytes() for p in alone if not p.reason]
    assert [p.image_id for p in alone] == list("cab")
    assert [bool(p.reason) for p in alone] == [False, True, False]
    assert list(draw_pictures(jobs, SMALL, workers=2, overwrite=True)) == alone
    assert [p.path.read_bytes() for p in alone if not p.reason] == pictures
    for name in ("contact_sheet", "contact_sheet_003", "energies"):
        with pytest.raises(BadInput, match=f"image '{name}' has the name"):
            list(draw_pictures([replace(job, image_id=name, picture=job.picture.with_name(f"{name}.png"))], SMALL))


def test_contact_sheets(job):
    folder = job.picture.parent
    good = draw_picture(job, SMALL)
    bad = FilmPicture("b" * 200, folder / "b.png", reason="image b.png cannot be read (it is no image); give an intact file")
    assert write_contact_sheets([good] * 24 + [bad], folder) == [folder / f"contact_sheet_00{n}.png" for n in (1, 2)]
    (folder / "contact_sheet_of_mine.png").touch()
    assert write_contact_sheets([good, bad], folder) == [folder / "contact_sheet.png"]
    assert sorted(p.name for p in folder.glob("*.png")) == ["contact_sheet.png", "contact_sheet_of_mine.png", "film.png"]
    with Image.open(folder / "contact_sheet.png") as image:
        sheet = np.asarray(image.convert("RGB")).astype(int)
    panel = np.asarray(Image.fromarray(film_panel(good.path)).resize((300, 479))).astype(int)
    # Left cell: the film as in its picture. Right cell: the reason on dark red.
    assert np.abs(sheet[54:533, 8:308] - panel).mean() < 6
    red = sheet[60:500, 330:600]
    assert np.median(red[..., 0]) > 60
    assert np.median(red[..., 1]) < 60
    assert (red.min(axis=2) > 200).sum() > 100  # the reason's letters


def test_energies_of_all_films(job, films):
    film = tiled(films[0].pixels)
    selection = film.selection
    energies = selection.candidates.freq_energy[~np.isin(selection.fate, ["intensity", "nonzero"])]
    counts = energy_counts(selection)
    assert counts.sum() == len(energies) > 20
    pictures = [FilmPicture("a", job.picture, "", selection.counts, ("padded",), tuple(counts.tolist()))] * 3
    pictures.append(FilmPicture("b", job.picture, "broken"))
    found = _energy_percentiles(pictures)
    for percentile, energy in found.items():
        # A bin is 12 % wide, and the bins know nothing of the gaps between values.
        low, high = np.percentile(energies, [max(0, percentile - 4), min(100, percentile + 4)])
        assert low / 1.13 <= energy <= high * 1.13 + ENERGY_EDGES[1]
    lines = summary_lines(pictures)
    assert f"kept {3 * selection.counts['kept']}" in " ".join(" ".join(lines).split())
    assert "padded 3 films" in " ".join(" ".join(lines).split())
    assert f"{found[95]:.2g} (95 %)" in lines[-1]
    write_energies(pictures, CONFIG, job.image.parent)
    with Image.open(job.image.parent / "energies.png") as picture:
        assert picture.width == 700
    assert _energy_percentiles(pictures[-1:]) == {}
    write_energies(pictures[-1:], replace(CONFIG, freq_percentile=90), job.image.parent)


def test_threshold_of_a_percentile(films):
    selection = tiled(films[0].pixels, replace(CONFIG, freq_percentile=80)).selection
    gated = ~np.isin(selection.fate, ["intensity", "nonzero"])
    assert selection.threshold == np.percentile(selection.candidates.freq_energy[gated], 80)
    assert tiled(films[0].pixels).selection.threshold == CONFIG.min_freq_energy
    assert tiled(np.zeros((300, 200), np.uint16), replace(CONFIG, freq_percentile=80)).selection.threshold == np.inf


@pytest.mark.parametrize("view", ["MLO", "CC"])
def test_the_muscle_is_drawn_where_there_is_one(films, tmp_path, view):
    pixels = next(film.pixels for film in films if film.name == "P0_lmlo")
    film = tile_film(Mammogram(pixels, Header(*pixels.shape, bits=16, spacing_mm=SPACING, view=view)), CONFIG)
    draw_film(film, 128, tmp_path / "film.png", "a film")
    panel = film_panel(tmp_path / "film.png")
    rows, columns = where(panel, PECTORAL_COLOUR)
    assert (len(rows) > 0) == bool(film.pectoral.any()) == (view == "MLO")
    if view == "MLO":
        scale = panel.shape[0] / pixels.shape[0]
        assert rows.max() == pytest.approx(2 * np.flatnonzero(film.pectoral.any(axis=1))[-1] * scale, abs=8)


@pytest.mark.parametrize(("fog_mm2", "shown"), [(90.0, False), (1205.3, True)])
def test_the_title_names_the_area_that_was_cut_as_fog(films, fog_mm2, shown):
    film = tiled(films[2].pixels)
    figure = Figure()
    _draw_titles(figure, replace(film, segmentation=replace(film.segmentation, fog_mm2=fog_mm2)), "a film", ())
    assert any("fog cut: 12.1 cm²" in text.get_text() for text in figure.texts) == shown
    assert shown or not any("fog" in text.get_text() for text in figure.texts)
