"""Breast masks against reference masks of mini-MIAS films: overlap, boundary distances, doubt, lesions in kept tiles, time.

Run: python benchmarks/segmentation.py FOLDER [--sheet worst.png]
FOLDER holds mdb???.png (0.2 mm), Info.txt and masks_256.npz: `names`, and `masks` of 256 x 256 over the film as packed bits.
Every second film of the list is the half to tune on, the others are the half to report. Of that half, the films whose base is
even have a row of their own: see :func:`base_spread`.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import imagecodecs
import numpy as np
import pandas as pd
from scipy import ndimage

from mammostream.preprocess.mammogram import Header, Mammogram
from mammostream.preprocess.segmentation import Segmentation, segment_breast
from mammostream.preprocess.tiling import TilingConfig, tile_film
from mammostream.shards.annotations.mias import SPACING_MM, mias_films
from mammostream.shards.annotations.tree import ImageTree

GRID = 256
CLEAR_MM = 10.0
EVEN = 0.1
TILING = TilingConfig(tile_size=128, stride=64, pixel_spacing=0.4)


def read_references(folder: Path) -> dict[str, np.ndarray]:
    """Return the reference masks (256, 256) by film."""
    stored = np.load(folder / "masks_256.npz")
    masks = np.unpackbits(stored["masks"], axis=2)[:, :, :GRID].astype(bool)
    return dict(zip(map(str, stored["names"]), masks, strict=True))


def on_grid(found: Segmentation) -> np.ndarray:
    """Return a mask on the references' grid: a point is breast if half of it is."""
    mask = np.asarray(found.mask)
    step = mask.shape[0] // GRID
    return mask.reshape(GRID, step, GRID, step).mean((1, 3)) >= 0.5


def boundary_mm(mask: np.ndarray, reference: np.ndarray, spacing: float) -> np.ndarray:
    """Return the distance in mm of each point of a mask's outline, inside the film, from the reference's outline."""

    def outline(breast: np.ndarray) -> np.ndarray:
        return breast & ~ndimage.binary_erosion(breast, border_value=1)

    edge = outline(mask)
    return ndimage.distance_transform_edt(~outline(reference))[edge] * spacing if edge.any() else np.array([np.inf])


def base_spread(pixels: np.ndarray, reference: np.ndarray) -> float:
    """Return how uneven the film base is: the range of the central 80 % of its levels, over the contrast from base to tissue.

    A level is the median of a block more than 10 mm off the reference. Canvas, which is constant, is left out. NaN: no base.
    """
    step = pixels.shape[0] // GRID
    blocks = pixels.reshape(GRID, step, GRID, step).swapaxes(1, 2).reshape(GRID, GRID, -1)
    levels = np.median(blocks, 2)
    base = levels[(ndimage.distance_transform_edt(~reference) * SPACING_MM * step > CLEAR_MM) & (np.ptp(blocks, 2) > 0)]
    if not base.size:
        return np.nan
    low, middle, high = np.percentile(base, (10, 50, 90))
    return float((high - low) / max(np.median(levels[reference]) - middle, 1))


def judge(folder: Path, references: dict[str, np.ndarray], lesions: pd.DataFrame, name: str) -> dict[str, Any]:
    """Return the figures of a film."""
    pixels = imagecodecs.imread(folder / f"{name}.png")
    started = time.perf_counter()
    found = segment_breast(pixels, SPACING_MM)
    seconds = time.perf_counter() - started
    row: dict[str, Any] = {
        "film": name,
        "seconds": seconds,
        "doubt": "doubtful_mask" in found.flags,
        "plausibility": found.plausibility,
    }
    if name in references:
        mask, reference = on_grid(found), references[name]
        distances = boundary_mm(mask, reference, SPACING_MM * pixels.shape[0] / GRID)
        row |= {"iou": (mask & reference).sum() / (mask | reference).sum()}
        row |= {"extra": (mask & ~reference).sum() / reference.sum(), "missing": (reference & ~mask).sum() / reference.sum()}
        row |= {"base_spread": base_spread(pixels, reference)}
        row |= {"median_mm": np.median(distances), "p95_mm": np.percentile(distances, 95)}
    film = tile_film(Mammogram(pixels, Header(*pixels.shape, bits=8, spacing_mm=SPACING_MM)), TILING)
    boxes = np.array([film.native_box(i, TILING.tile_size) for i in range(len(film.tiles.x))]).reshape(-1, 3)
    centres = lesions.loc[lesions["image_id"] == name, ["xmin", "ymin", "xmax", "ymax"]].drop_duplicates().to_numpy()
    centres = (centres[:, :2] + centres[:, 2:]) / 2
    inside = [((boxes[:, :2] <= c) & (c < boxes[:, :2] + boxes[:, 2:])).all(1).any() for c in centres]
    return row | {"lesions": len(inside), "in_tiles": sum(inside), "tiles": len(boxes)}


def summary(rows: pd.DataFrame, half: str) -> dict[str, Any]:
    """Return the figures of a half of the films."""
    iou = rows["iou"]
    return {
        "half": half,
        "films": len(rows),
        "mean IoU": f"{iou.mean():.3f}",
        "5th percentile": f"{np.percentile(iou, 5):.3f}",
        "below 0.80": int((iou < 0.8).sum()),
        "below 0.90": int((iou < 0.9).sum()),
        "too much": f"{rows['extra'].mean():.1%}",
        "too little": f"{rows['missing'].mean():.1%}",
        "outline, median": f"{rows['median_mm'].median():.1f} mm",
        "95th percentile": f"{rows['p95_mm'].median():.1f} mm",
        "doubtful": int(rows["doubt"].sum()),
    }


def draw_worst(folder: Path, references: dict[str, np.ndarray], rows: pd.DataFrame, path: Path, count: int = 24) -> None:
    """Draw the films with the lowest overlap: the mask's outline in red, the reference's in green."""
    from PIL import Image, ImageDraw

    across, edge = 6, 384
    sheet = Image.new("RGB", (across * edge, -(-count // across) * edge))
    for place, row in enumerate(rows.nsmallest(count, "iou").itertuples()):
        pixels = imagecodecs.imread(folder / f"{row.film}.png").astype(float)
        picture = np.repeat((np.log1p(pixels) / np.log(256) * 255).clip(0, 255).astype(np.uint8)[..., None], 3, 2)
        for mask, colour in (
            (on_grid(segment_breast(pixels, SPACING_MM)), (255, 60, 60)),
            (references[row.film], (60, 255, 60)),
        ):
            full = np.kron(mask, np.ones((pixels.shape[0] // GRID,) * 2, bool))
            picture[full ^ ndimage.binary_erosion(full, iterations=2)] = colour
        tile = Image.fromarray(picture).resize((edge, edge))
        ImageDraw.Draw(tile).text((6, 6), f"{row.film}  {row.iou:.3f}", (255, 255, 0))
        sheet.paste(tile, (place % across * edge, place // across * edge))
    sheet.save(path)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--sheet", type=click.Path(path_type=Path), help="Draw the 24 worst films here.")
@click.option("--workers", default=2)
def main(folder: Path, sheet: Path | None, workers: int) -> None:
    """Print the figures as Markdown tables."""
    references = read_references(folder)
    lesions = mias_films(ImageTree.scan(folder), folder / "Info.txt").findings
    names = sorted(path.stem for path in folder.glob("mdb*.png"))
    with ProcessPoolExecutor(workers) as pool:
        rows = pd.DataFrame(pool.map(partial(judge, folder, references, lesions), names))
    judged = rows[rows["iou"].notna()].set_index("film").loc[list(references)].reset_index()
    reported = judged[1::2]
    even = reported[reported["base_spread"] <= EVEN]
    halves = {"tuned on": judged[0::2], "reported": reported, "reported, even base": even}
    table = pd.DataFrame([summary(half, name) for name, half in halves.items()])
    click.echo("| " + " | ".join(table.columns) + " |\n" + "|---" * len(table.columns) + "|")
    for line in table.astype(str).to_numpy():
        click.echo("| " + " | ".join(line) + " |")
    click.echo(
        f"\n{rows['in_tiles'].sum()} of {rows['lesions'].sum()} lesion centres in kept tiles, {rows['tiles'].mean():.1f} tiles "
        f"per film; {1000 * rows['seconds'].median():.0f} ms per film"
    )
    if sheet is not None:
        draw_worst(folder, references, judged, sheet)


if __name__ == "__main__":
    main()
