"""``mammostream bench infer``: prediction next to the loop that one writes first, with the same weights, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from mammostream.common.errors import BadInput
from mammostream.common.files import write_text
from mammostream.common.machine import describe
from mammostream.common.options import Command, config_file_option, config_options
from mammostream.common.progress import progress
from mammostream.common.temporaries import scratch_folder
from mammostream.train.predict.config import EmbedConfig, InferConfig

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch
    from torch import nn

    from mammostream.models.classifier import MammogramClassifier
    from mammostream.train.predict.network import Predictor
    from mammostream.train.predict.stream import Part

FILE = click.Path(path_type=Path)
_PLAIN_BATCH = 32


@click.command(cls=Command)
@click.option("--model-path", type=FILE, required=True, help="Classifier checkpoint that 'finetune' wrote.")
@click.option("--shards", "shards_dir", type=FILE, required=True, help="Shard directory; all tiles of the split are predicted.")
@click.option("--split", default=None, help="The split; default: all.")
@click.option("--manifest", type=FILE, help="Measure raw films too: those of this manifest.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Turns of each contender.")
@click.option("--tolerance", type=float, default=1e-3, help="Largest difference of a probability that counts as equal.")
@click.option("--output", type=FILE, help="A Markdown page to write the table to.")
@config_options(EmbedConfig)
@config_file_option
def infer(
    model_path: Path,
    shards_dir: Path,
    split: str | None,
    manifest: Path | None,
    rounds: int,
    tolerance: float,
    output: Path | None,
    **options: Any,
) -> None:
    """Measure prediction against a plain loop over the same tiles as PNG files.

    The plain loop opens each file with PIL, makes RGB of it and normalises it with torchvision, and takes batches of 32 from a
    DataLoader (without workers, and with two) to a torchvision network in float32. It has the same weights, and its answers
    must be ours. Ours goes from shards to the finished tables. Prints a Markdown table.
    """
    import torch

    from mammostream.shards.build.pack import unpack_shards
    from mammostream.shards.reading import open_shards
    from mammostream.train.predict.network import load_predictor
    from mammostream.train.predict.stream import shard_parts

    shards = open_shards(shards_dir)
    predictor = load_predictor(model_path, InferConfig(**options))
    with scratch_folder() as folder:
        root = Path(folder)
        unpack_shards(shards, root / "tiles", split)
        tiles = shards.tiles(split).sort_values("tile", ignore_index=True)
        paths = [root / "tiles" / f"{key}.png" for key in tiles["key"]]
        plain = plain_network(cast("MammogramClassifier", predictor.model), predictor.runtime.device)
        contenders = {
            "mammostream, from shards": lambda: _ours(predictor, shard_parts(predictor, shards, split), root),
            "PIL + torchvision": lambda: _plain(predictor, plain, paths, workers=0),
            "PIL + torchvision, 2 workers": lambda: _plain(predictor, plain, paths, workers=2),
        }
        lines = [*_rows("tile", len(paths), contenders, rounds, tolerance)]
        if manifest is not None:
            films = _films(manifest)
            lines += _rows("film", len(films), _film_contenders(predictor, plain, films, root), rounds, tolerance)
    facts = [
        describe(),
        f"Model: {predictor.model.backbone.arch}; ours {predictor.runtime}, batches of {options['batch_size']}, "
        f"{options['num_workers']} decoding threads, compiled: {predictor.config.compiles(predictor.runtime.device.type)}; "
        f"the plain loop in fp32, batches of {_PLAIN_BATCH}; {torch.get_num_threads()} torch threads.",
        f"Task: {len(paths)} tiles of {predictor.preprocessing['tile_size']} pixels, {shards.meta['bits']} bits, codec "
        f"{shards.codec}; {rounds} rounds in turns after one that does not count, medians.",
    ]
    table = [
        "| contender | unit | a second | lowest-highest | mammostream is | largest difference of a probability |",
        "|---|---|---:|---:|---:|---:|",
        *lines,
    ]
    page = "\n".join([*(f"- {fact}" for fact in facts), "", *table])
    click.echo(page)
    if output is not None:
        write_text(output, f"# Prediction next to a plain loop\n\n{page}\n")


def plain_network(model: MammogramClassifier, device: torch.device) -> nn.Module:
    """Return a copy of a classifier whose backbone takes three channels, as torchvision's does, and which gives logits."""
    import copy

    import torch
    from torch import nn

    plain = copy.deepcopy(model.backbone)
    name, narrow = next((name, m) for name, m in plain.named_modules() if isinstance(m, nn.Conv2d))
    geometry: dict[str, Any] = {name: getattr(narrow, name) for name in ("kernel_size", "stride", "padding")}
    wide = nn.Conv2d(3, narrow.out_channels, **(geometry | {"bias": narrow.bias is not None}))
    with torch.no_grad():
        # Of a grey image's three equal channels each gives a third.
        wide.weight.copy_(narrow.weight.repeat(1, 3, 1, 1) / 3)
        if narrow.bias is not None and wide.bias is not None:
            wide.bias.copy_(narrow.bias)
    plain.set_submodule(name, wide)
    network = nn.Sequential(plain, model.classification_head).to(device)
    return network.eval()


def plain_transform(predictor: Predictor) -> Callable[[Any], Any]:
    """Return torchvision's way from a PIL image to a normalised RGB tensor (3, H, W); 16 bits are kept."""
    import numpy as np
    import torch
    from torchvision import transforms

    record = predictor.preprocessing
    normalise = transforms.Normalize([record["mean"]] * 3, [record["std"]] * 3)
    to_tensor = transforms.ToTensor()

    def transform(image: Any) -> Any:
        if image.mode.startswith("I"):  # ToTensor would leave 16 bits unscaled
            grey = torch.from_numpy(np.asarray(image).astype(np.float32) / 65535)[None]
            return normalise(grey.repeat(3, 1, 1))
        return normalise(to_tensor(image.convert("RGB")))

    return transform


class _Files:
    """A dataset of image files, as a DataLoader takes it."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[Any], Any]) -> None:
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, position: int) -> Any:
        from PIL import Image

        return self._transform(Image.open(self._paths[position]))


def _plain(predictor: Predictor, network: Any, paths: Sequence[Path], workers: int) -> np.ndarray:
    from torch.utils.data import DataLoader

    dataset: Any = _Files(paths, plain_transform(predictor))
    return _predict(predictor, network, DataLoader(dataset, batch_size=_PLAIN_BATCH, num_workers=workers))


def _predict(predictor: Predictor, network: Any, batches: Iterable[Any]) -> np.ndarray:
    import numpy as np
    import torch

    found = []
    with torch.no_grad():
        for batch in batches:
            logits = network(batch.to(predictor.runtime.device)).cpu()
            found.append(predictor.calibrated(logits))
    return np.concatenate(found)


def _ours(predictor: Predictor, parts: Sequence[Part], root: Path) -> np.ndarray:
    import pandas as pd

    from mammostream.train.levels.aggregation import PROBABILITY
    from mammostream.train.predict.parts import merge_parts, predict_parts

    with scratch_folder(root) as folder:
        place = Path(folder)
        predict_parts(predictor, parts, place / "parts", "tile", predictor.runtime)
        merge_parts(parts, place / "parts", predictor, {"class_names": predictor.class_names}, place, "parquet")
        table: pd.DataFrame = pd.read_parquet(place / "predictions.parquet")
    return table[[PROBABILITY + name for name in predictor.class_names]].to_numpy()


def _films(manifest: Path) -> list[Any]:
    import pandas as pd

    from mammostream.shards.manifest import read_manifest
    from mammostream.train.predict.films import FilmInput

    rows = read_manifest(manifest).to_dict("records")
    return [
        FilmInput(
            path=Path(row["path"]),
            image_id=row["image_id"],
            shape=(0, 0),
            spacing_mm=None if pd.isna(row["pixel_spacing_mm"]) else row["pixel_spacing_mm"],
        )
        for row in rows
    ]


def _film_contenders(
    predictor: Predictor, network: Any, films: Sequence[Any], root: Path
) -> dict[str, Callable[[], np.ndarray]]:
    """Return ours and a loop that prepares a film by the same functions, then predicts it, then takes the next."""
    import numpy as np
    import torch

    from mammostream.train.predict.films import film_parts, prepare_film

    record, transform = predictor.preprocessing, plain_transform(predictor)

    def loop() -> np.ndarray:
        from PIL import Image

        found = []
        for film_input in films:
            film = prepare_film(record, film_input)
            tiles = [
                transform(Image.fromarray(film.cut(i, record["tile_size"], record["bits"]))) for i in range(len(film.tiles.x))
            ]
            starts = range(0, len(tiles), _PLAIN_BATCH)
            found.append(_predict(predictor, network, (torch.stack(tiles[i : i + _PLAIN_BATCH]) for i in starts)))
        return np.concatenate(found)

    return {
        "mammostream, from raw films": lambda: _ours(predictor, film_parts(predictor, films), root),
        "the same preprocessing, PIL + torchvision, film by film": loop,
    }


def _rows(
    unit: str, count: int, contenders: Mapping[str, Callable[[], np.ndarray]], rounds: int, tolerance: float
) -> list[str]:
    """Measure contenders in turns, the first being ours, and return a row of the table for each.

    Raises
    ------
    BadInput
        Their answers differ by more than the tolerance.
    """
    import numpy as np

    answers = {name: predict() for name, predict in contenders.items()}  # which warms everything up
    ours = next(iter(contenders))
    differences = {name: float(np.abs(answer - answers[ours]).max()) for name, answer in answers.items()}
    worst = max(differences, key=lambda name: differences[name])
    if differences[worst] > tolerance:
        raise BadInput(
            f"'{worst}' and ours differ by up to {differences[worst]:.2g}; where --precision is below fp32, give a larger "
            "--tolerance"
        )
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    turns = [name for number in range(rounds) for name in list(contenders)[:: 1 - 2 * (number % 2)]]
    for name in progress(turns, f"measuring {unit}s", "turn"):
        start = time.perf_counter()
        contenders[name]()
        rates[name].append(count / (time.perf_counter() - start))
    lines = []
    for name, its in rates.items():
        ratio = statistics.median(mine / other for mine, other in zip(rates[ours], its, strict=True))
        times = "–" if name == ours else f"{ratio:.2f}×"
        lines.append(
            f"| {name} | {unit}s | {statistics.median(its):.3g} | {min(its):.3g}-{max(its):.3g} | {times} | "
            f"{differences[name]:.1e} |"
        )
    return lines
