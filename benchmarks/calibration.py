"""What probabilities are worth: one temperature against slope and intercept per class; tile thresholds against those of films.

Run: python benchmarks/calibration.py                      (simulated, half a minute)
     python benchmarks/calibration.py --predictions before=DIR --predictions after=DIR --tile-labels CSV --manifest M
The second compares folders that 'mammostream infer' wrote with two versions of a model on the same films.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pandas as pd
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit

from mammostream.train.evaluate.evaluate import choose_thresholds
from mammostream.train.evaluate.matching import match_labels
from mammostream.train.evaluate.metrics import expected_calibration_error
from mammostream.train.evaluate.reading import read_predictions
from mammostream.train.levels.aggregation import unit_logits
from mammostream.train.levels.calibration import fit_calibration
from mammostream.train.levels.fitting import TileLogits, fit_levels, judge

PREVALENCE, TILES, FILMS, TILES_OF_FILM = 0.025, 200_000, 2000, 100
TEMPERATURES = (0.05, 20.0)  # the range that versions up to 0.1.0 searched
Loss = Callable[[np.ndarray, float], np.ndarray]


def bce(weight: float, smoothing: float, weigh_smoothed: bool) -> Loss:
    """Binary cross entropy; versions up to 0.1.0 multiplied the smoothed label by the weight of positives."""

    def loss(z: np.ndarray, y: float) -> np.ndarray:
        target = y * (1 - smoothing) + smoothing / 2
        positive, negative = target * np.logaddexp(0, -z), (1 - target) * np.logaddexp(0, z)
        return weight * positive + negative if weigh_smoothed else (weight if y else 1) * (positive + negative)

    return loss


def asymmetric(smoothing: float) -> Loss:
    """The asymmetric loss with its defaults; versions up to 0.1.0 smoothed by default."""

    def loss(z: np.ndarray, y: float) -> np.ndarray:
        target, shifted = y * (1 - smoothing) + smoothing / 2, np.maximum(expit(z) - 0.05, 1e-8)
        return target * np.logaddexp(0, -z) - (1 - target) * shifted**4 * np.log1p(-shifted)

    return loss


def true_probabilities(count: int, rng: np.random.Generator) -> np.ndarray:
    """Probabilities of tiles with a mean of :data:`PREVALENCE`."""
    evidence = 2 * rng.standard_normal(count)
    return expit(evidence + brentq(lambda shift: expit(evidence + shift).mean() - PREVALENCE, -20, 5))


def optimum(probabilities: np.ndarray, loss: Loss) -> np.ndarray:
    """Logits of a network at the optimum of its loss."""
    grid, known = np.linspace(-14, 14, 5601), np.quantile(probabilities, np.linspace(0, 1, 600))
    best = [grid[np.argmin(p * loss(grid, 1.0) + (1 - p) * loss(grid, 0.0))] for p in known]
    return np.interp(probabilities, known, best)


def best_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """The temperature with the lowest log loss (Guo et al. 2017)."""

    def loss(log_t: float) -> float:
        z = logits * np.exp(-log_t)
        return float(np.mean(np.logaddexp(0, z) - labels * z))

    return float(np.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-6}).x))


def simulate_tiles() -> pd.DataFrame:
    """ECE on tiles that were not fitted on, by loss."""
    rng = np.random.default_rng(0)
    probabilities = true_probabilities(TILES, rng)
    labels, half = (rng.random(TILES) < probabilities).astype(float), TILES // 2
    weight = (1 - PREVALENCE) / PREVALENCE
    losses = {
        "bce": (bce(1, 0, True), bce(1, 0, False)),
        "bce, smoothing 0.1": (bce(1, 0.1, True), bce(1, 0.1, False)),
        "bce, --pos-weight auto": (bce(weight, 0, True), bce(weight, 0, False)),
        "bce, --pos-weight auto, smoothing 0.1": (bce(weight, 0.1, True), bce(weight, 0.1, False)),
        "asymmetric, its default smoothing": (asymmetric(0.1), asymmetric(0)),
    }
    rows = []
    for name, (before, after) in losses.items():
        z, new = optimum(probabilities, before), optimum(probabilities, after)
        temperature = best_temperature(labels[:half], z[:half])
        both = fit_calibration(labels[:half, None], z[:half, None])
        fitted = fit_calibration(labels[:half, None], new[:half, None])
        rows.append(
            {
                "loss": name,
                "raw": expected_calibration_error(labels[half:], expit(z[half:])),
                "temperature (before)": expected_calibration_error(labels[half:], expit(z[half:] / temperature)),
                "T": temperature,
                "same logits, slope and intercept": expected_calibration_error(labels[half:], both(z[half:, None])[:, 0]),
                "loss and calibration of now": expected_calibration_error(labels[half:], fitted(new[half:, None])[:, 0]),
            }
        )
    return pd.DataFrame(rows)


def simulate_films() -> pd.DataFrame:
    """Normal films of 100 tiles: what is found in them by thresholds of tiles and of films, and their noisy-or."""

    def films(seed: int) -> TileLogits:
        rng = np.random.default_rng(seed)
        film = np.repeat(np.arange(FILMS), TILES_OF_FILM)
        lesion = np.repeat(rng.random(FILMS) < 0.25, TILES_OF_FILM)
        labels = (lesion & (np.tile(np.arange(TILES_OF_FILM), FILMS) < 10)).astype(float)  # 2.5 % of all tiles
        logits = 1.5 * rng.standard_normal(len(film)) + 3 * labels
        names = np.char.add("f", film.astype(str))
        return TileLogits(labels[:, None], logits[:, None], names, np.full(len(film), ""), names)

    fitted, tiles = fit_levels(films(1)), films(2)
    judged = judge(tiles, fitted)
    tile = judged["tile", "prob"]
    raw = unit_logits(tile.probabilities, np.unique(tiles.images, return_inverse=True)[1])
    threshold, rows = fitted["tile"]["prob"].thresholds[0], []
    for score, logits in raw.items():
        own = judged["image", score]
        y, before = own.labels[:, 0], expit(logits[:, 0])
        rows.append(
            {
                "score": score,
                "normal films found, tile threshold": (before[y == 0] >= threshold).mean(),
                "own threshold": own.found[y == 0, 0].mean(),
                "sensitivity at it": own.found[y == 1, 0].mean(),
                "median of normal films, raw": np.median(before[y == 0]),
                "calibrated": np.median(own.probabilities[y == 0, 0]),
                "ECE raw": expected_calibration_error(y, before),
                "ECE calibrated": expected_calibration_error(y, own.probabilities[:, 0]),
            }
        )
    return pd.DataFrame(rows)


def real_films(folders: dict[str, Path], tile_labels: Path, manifest: Path) -> pd.DataFrame:
    """The figures of predictions with the thresholds that their own version used for decisions."""
    rows = []
    for version, folder in folders.items():
        for table, labels, scores in (
            ("predictions", tile_labels, ["prob"]),
            ("image_predictions", manifest, ["max", "top3", "noisy_or"]),
        ):
            for score in scores:
                predictions = read_predictions(folder / f"{table}.parquet", score)
                matched = match_labels(predictions, labels)
                level = matched.level if predictions.calibrations else "tile"  # before, tiles' thresholds were used for films
                thresholds, _ = choose_thresholds(predictions, matched.class_names, level)
                for c, name in enumerate(matched.class_names):
                    known = ~np.isnan(matched.labels[:, c])
                    y, p = matched.labels[known, c], matched.probabilities[known, c]
                    limit = 0.5 if thresholds[c] is None else thresholds[c]
                    rows.append(
                        {
                            **{"class": name, "level": matched.level, "score": score, "version": version},
                            **{"positive": int(y.sum()), "negative": int((y == 0).sum())},
                            "ECE": expected_calibration_error(y, p),
                            "Brier": np.mean((p - y) ** 2),
                            "median of negatives": np.median(p[y == 0]),
                            "threshold": limit,
                            "specificity": (p[y == 0] < limit).mean(),
                            "sensitivity": (p[y == 1] >= limit).mean() if y.any() else np.nan,
                        }
                    )
    return pd.DataFrame(rows).sort_values(["class", "level", "score"], kind="stable", ignore_index=True)


@click.command()
@click.option("--predictions", multiple=True, help="NAME=FOLDER that 'infer' wrote; may be given several times.")
@click.option("--tile-labels", type=click.Path(path_type=Path), help="Labels of the tiles.")
@click.option("--manifest", type=click.Path(path_type=Path), help="Labels of the films.")
def main(predictions: tuple[str, ...], tile_labels: Path, manifest: Path) -> None:
    """Print the tables as Markdown."""
    if predictions:
        folders = {name: Path(folder) for name, _, folder in (text.partition("=") for text in predictions)}
        click.echo(table(real_films(folders, tile_labels, manifest)))
        return
    click.echo(table(simulate_tiles()) + "\n\n" + table(simulate_films()))


def table(frame: pd.DataFrame) -> str:
    """Return a frame as a Markdown table."""
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in frame.to_numpy(object)]
    lines = [list(frame.columns), ["---"] * len(frame.columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
