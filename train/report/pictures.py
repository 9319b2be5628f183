"""The pictures of a report: which ones, in which order, how they are called, and small enough to embed."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mammostream.common.temporaries import scratch_folder
from mammostream.shards.archive import escape_id, short_name
from mammostream.train.predict.heat_maps import heat_map, heat_step
from mammostream.train.run.charts import draw_panels, metric_title, new_figure, save_figure

PICTURES_OF_A_FOLDER = 24  # a page of thousands opens nowhere
PICTURE_BYTES = 32 * 2**20  # of all of a page's pictures, before base64
_MAX_EDGE = 1600  # pixels: larger pictures are shrunk
_MAP_INCHES = 5.0  # a map's height
_SMALL_FILE = 100_000  # bytes up to which a picture goes in as it is

# What a picture's name begins with -> what it shows, and how wide it needs to be. The order is that of the page.
_KINDS = {
    "contact_sheet": ("Contact sheet: films with their masks and kept tiles", "wide"),
    "top_tiles": ("Contact sheet: the highest tiles", "wide"),
    "roc": ("ROC curves", "chart"),
    "precision_recall": ("Precision and recall", "chart"),
    "reliability": ("Calibration: share of positives by predicted probability", "chart"),
    "comparison": ("ROC curves of both predictions", "chart"),
    "froc": ("FROC: sensitivity by false positives per image", "chart"),
    "subgroups": ("AUC by subgroup", "medium"),
    "probe": ("Probes of frozen features", "wide"),
    "views": ("Tiles and the views that the network learns from", "wide"),
    "heatmap": ("Heat map over a film", "wide"),
    "energies": ("Energies of all candidates", "chart"),
    "": ("Picture", "medium"),
}
# The panels of a training in their order; what else is logged follows.
_CURVES = (
    *("loss", "train_loss", "val_loss", "mean_auc", "mean_ap", "z_std", "effective_rank", "view_retrieval", "probe"),
    *("breast_ratio", "target_distance", "lr", "lr_backbone", "lr_head", "momentum", "grad_norm"),
    *("pairs_per_second", "data_wait_percent", "mfu_percent", "gpu_memory_gib"),
)
_NO_CURVE = re.compile(
    r"^(step|epoch|rows|patients|films|collapse|collapsed)$|/(positives|negatives|threshold)$|^per_class/.*/(?!auc$)"
)


@dataclass(frozen=True)
class Picture:
    """A picture as the page holds it."""

    file: str
    """Its name in the run's folder, or of the metric it draws."""
    caption: str
    """What it shows, in words."""
    width: str
    """``wide`` fills the page, ``medium`` half of it, ``chart`` a third; a ``curve`` has its title in the picture."""
    source: str
    """``data:`` URI."""

    @property
    def size(self) -> int:
        """Bytes of the page that it takes."""
        return len(self.source)


def folder_pictures(folder: Path, scores: Mapping[str, float]) -> list[Path]:
    """Return a folder's pictures: contact sheets first, then charts, views and heat maps, the highest ones first.

    Parameters
    ----------
    folder
        Where they lie. The curves of a training are left out where its metrics are there to be drawn.
    scores
        Heat map's name -> its highest probability.
    """
    drawn_anew = {"curves"} if (folder / "metrics.jsonl").is_file() else set()
    found = [path for path in sorted(folder.glob("*.png")) if path.stem not in drawn_anew]
    order = list(_KINDS)
    return sorted(found, key=lambda path: (order.index(_kind(path.stem)), -scores.get(path.stem, 0.0)))


def heat_map_scores(images: pd.DataFrame, class_names: Sequence[str]) -> dict[str, float]:
    """Return the name of each film's heat map, without its ending, with the film's highest probability."""
    return {
        short_name(f"heatmap_{escape_id(image_id)}_{escape_id(name)}"): score
        for name in class_names
        for image_id, score in images[["image_id", f"max:{name}"]].dropna().itertuples(index=False)
    }


def embed(path: Path) -> Picture:
    """Return a picture file ready for the page: as it is where it is small, else at most 1600 pixels wide as WebP."""
    from PIL import Image

    kind = _kind(path.stem)
    what, width = _KINDS[kind]
    about = path.stem.removeprefix(kind).strip("_")
    data, form = path.read_bytes(), "png"
    if len(data) > _SMALL_FILE:
        with Image.open(path) as image:
            picture = image.convert("RGB")
        picture.thumbnail((_MAX_EDGE, 4 * _MAX_EDGE))
        buffer = io.BytesIO()
        picture.save(buffer, "webp", quality=85, method=4)
        if buffer.tell() < len(data):
            data, form = buffer.getvalue(), "webp"
    caption = f"{what}: {about}" if about and kind else what if kind else path.stem
    return Picture(path.name, caption, width, _uri(data, form))


def draw_tile_map(tiles: pd.DataFrame, probabilities: np.ndarray, boxes: np.ndarray, name: str) -> Picture:
    """Draw what a film's tiles blend to, as `infer` draws it over the film, where only the tiles are there.

    Parameters
    ----------
    tiles
        ``_x, _y, _size`` in native pixels, of N tiles.
    probabilities
        (N,) of the class.
    boxes
        (B, 4) of xmin, ymin, xmax, ymax.
    name
        The class.
    """
    from matplotlib.patches import Rectangle

    x, y, sizes = (tiles[column].to_numpy(np.float64) for column in ("_x", "_y", "_size"))
    size = int(np.median(sizes))
    far = np.concatenate([np.stack([x + sizes, y + sizes], 1), boxes[:, 2:]]).max(0)
    step = heat_step(size)
    heat = heat_map((int(far[1]), int(far[0])), x, y, size, probabilities, step)
    figure = new_figure(_MAP_INCHES * far[0] / far[1] + 1.5, _MAP_INCHES)
    axes = figure.subplots()
    axes.set_facecolor("#d8dde2")
    extent = (0, heat.shape[1] * step, heat.shape[0] * step, 0)
    shown = axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    for xmin, ymin, xmax, ymax in boxes:
        axes.add_patch(Rectangle((xmin, ymin), xmax - xmin, ymax - ymin, facecolor="none", edgecolor="#39d0ff", linewidth=1.5))
    axes.set(xlim=(0, far[0]), ylim=(far[1], 0), xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes, fraction=0.04, pad=0.02).set_label(f"probability of {name}".replace("$", r"\$"))
    with scratch_folder() as folder:
        path = Path(folder) / "heatmap.png"
        save_figure(figure, path)
        return embed(path)


def curves(lines: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Draw each metric of a training against the step, a picture each, the known ones first."""
    logged = dict.fromkeys(
        name.removeprefix("epoch_mean/") for line in lines for name, value in line.items() if value is not None
    )
    names = [name for name in logged if not _NO_CURVE.search(name)]
    known = [name for name in _CURVES if name in names]
    ordered = [*known, *(name for name in names if name not in known)][:PICTURES_OF_A_FOLDER]
    found = []
    with scratch_folder() as folder:
        for name in ordered:
            path = Path(folder) / "panel.png"
            draw_panels(lines, [name], path)
            if path.is_file():
                found.append(Picture(name, f"{metric_title(name)} by step", "chart curve", _uri(path.read_bytes(), "png")))
                path.unlink()
    return found


def _kind(stem: str) -> str:
    return next(kind for kind in _KINDS if f"{stem}_".startswith(f"{kind}_" if kind else ""))


def _uri(data: bytes, form: str) -> str:
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"
