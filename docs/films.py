"""Draw docs/demo.jpg and docs/contact_sheet.jpg from the 8 real films. Run it after ``make demo`` as ``python docs/films.py``.

The first shows a film of the demo: mask and tiles, the film, the heat map of its prediction. The second is a contact sheet of
clusters that were planted near the skin, where masks and tiles are hardest to get right.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from mammostream.common.files import whole_file
from mammostream.common.real_films import films_folder
from mammostream.demo import CLASS, run_command
from mammostream.preprocess.preview import FILM_PANEL

FILM = "1-130_simulated0"
TITLE_SHARE = 0.12  # of the preview's height; its text names what the heat map's title says again
HEIGHT = 770


def main(demo: Path, output: Path) -> None:
    """Write both pictures into `output`; `demo` is the folder of a finished demo."""
    preview = Image.open(demo / f"preview/{FILM}.png").convert("RGB")
    left, _, width, _ = (round(share * preview.width) for share in FILM_PANEL)
    panel = preview.crop((left, round(TITLE_SHARE * preview.height), left + width, preview.height))
    heat = Image.open(demo / f"infer_film/heatmap_{FILM}_{CLASS}.png").convert("RGB")
    _save(_side_by_side([panel, heat]), output / "demo.jpg")
    with tempfile.TemporaryDirectory() as folder:
        _save(_clusters_near_the_skin(Path(folder)), output / "contact_sheet.jpg")


def _side_by_side(pictures: list[Image.Image]) -> Image.Image:
    scaled = [picture.resize((round(picture.width * HEIGHT / picture.height), HEIGHT)) for picture in pictures]
    sheet = Image.new("RGB", (sum(picture.width for picture in scaled), HEIGHT), "white")
    x = 0
    for picture in scaled:
        sheet.paste(picture, (x, 0))
        x += picture.width
    return sheet


def _clusters_near_the_skin(work: Path) -> Image.Image:
    options = ["--assume-spacing", "0.05", "--patient-regex", r"P_\d+", "--val-fraction", "0"]
    run_command(["prepare", "--images-root", str(films_folder()), "--output-dir", f"{work}/films", *options])
    near = ["--skin-distance-mm", "3", "--max-skin-distance-mm", "12", "--contrast", "25"]
    run_command(["simulate", "--manifest", f"{work}/films/manifest.parquet", "--output-dir", f"{work}/copies", *near])
    tables = ["--manifest", f"{work}/copies/manifest.parquet", "--findings", f"{work}/copies/findings.parquet"]
    run_command(["preview", *tables, "--output-dir", f"{work}/preview"])
    return Image.open(work / "preview/contact_sheet.png").convert("RGB")


def _save(picture: Image.Image, path: Path) -> None:
    with whole_file(path) as temporary:
        picture.save(temporary, "JPEG", quality=85)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"), Path(__file__).parent)
