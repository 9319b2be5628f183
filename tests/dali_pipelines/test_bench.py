"""``mammostream bench loader``: contenders do the same work, and the command measures them."""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import torch

from mammostream.dali_pipelines import RECIPES, LabelledLoader, PretrainLoader, View, baselines, bench
from mammostream.dali_pipelines.intensity import ImageFormat
from mammostream.shards import open_shards

FORM = ImageFormat(48, 0.449, 0.226)


@pytest.fixture(scope="session")
def packed(film, tmp_path_factory) -> Path:
    """A shard directory of 12 tiles of 16 bits, made by ``shards pack`` as a user would."""
    from mammostream.demo import run_command

    folder = tmp_path_factory.mktemp("packed")
    (folder / "tiles").mkdir()
    for i in range(12):
        tile = np.ascontiguousarray(film[50 * i : 50 * i + 48, 100:148])
        (folder / f"tiles/t{i:02d}.png").write_bytes(imagecodecs.png_encode(tile))
    rows = "\n".join(f"t{i:02d}.png,{i % 2}" for i in range(12))
    (folder / "labels.csv").write_text(f"tile_path,mass\n{rows}\n")
    run_command(
        shlex.split(
            f"shards pack --csv {folder}/labels.csv --split train --tiles-dir {folder}/tiles --output-dir {folder}/shards"
        )
    )
    return folder / "shards"


@pytest.fixture
def mammostream(monkeypatch, capfd) -> Callable[[str], tuple[int, str, str]]:
    """Run a command line as the console script does; return its exit code, stdout and stderr."""
    import mammostream as script

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mammostream", *shlex.split(line)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            script.main()
        return stop.value.code, *capfd.readouterr()

    return run


@pytest.mark.parametrize("maker", [baselines.OpenCVViews, baselines.TorchvisionViews])
def test_a_view_that_changes_nothing_is_the_evaluation(tiles, maker):
    """Same tiles, same normalisation: without augmentation, the contenders and the evaluation pipeline agree."""
    dataset = baselines.TileDataset(tiles.shards, maker((View(), View()), FORM))
    assert len(dataset) == len(tiles.pixels)
    (expected, _), *_ = LabelledLoader(tiles.shards, batch_size=23, tile_size=48, mean=0.449, std=0.226)
    for position, image in enumerate(expected):
        for view in dataset[position]:
            torch.testing.assert_close(view, image, rtol=0, atol=1e-5)


@pytest.fixture
def one_thread():
    """One thread each, as in the contenders' workers: on a busy machine several threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("maker", [baselines.OpenCVViews, baselines.TorchvisionViews])
def test_contenders_vary_as_much_as_we_do(tiles, maker, recipe):
    """The views' means and fine detail vary alike, so no contender is timed for less work."""
    torch.manual_seed(0)
    dataset = baselines.TileDataset(tiles.shards, maker(RECIPES[recipe], FORM))
    loader = PretrainLoader(
        tiles.shards, batch_size=23, tile_size=48, mean=0.449, std=0.226, views=RECIPES[recipe], initial_fill=8
    )
    ours = [torch.cat(views) for views in zip(*(batch[:2] for _ in range(6) for batch in loader), strict=True)]
    theirs = [torch.stack(views) for views in zip(*(dataset[i] for _ in range(6) for i in range(23)), strict=True)]
    for own, other in zip(ours, theirs, strict=True):
        assert own.shape == other.shape
        assert other.mean(dim=(1, 2, 3)).std() == pytest.approx(own.mean(dim=(1, 2, 3)).std().item(), rel=0.3)
        if maker is baselines.OpenCVViews:  # torchvision leaves black corners, which add detail
            fine = [(views[..., 1:] - views[..., :-1]).abs().mean().item() for views in (own, other)]
            assert fine[1] == pytest.approx(fine[0], rel=0.1)


def test_measuring_the_loader(packed, tmp_path, mammostream):
    report = tmp_path / "results/loader.md"
    code, out, err = mammostream(
        f"bench loader --shards {packed} --batch-size 4 --rounds 2 --seconds 0.05 --only mammostream,opencv --output {report}"
    )
    assert code == 0, err
    page = report.read_text()
    for text in (out, page):
        assert "12 tiles of 48×48 pixels, 16 bits, codec tif; recipe guide" in text
        assert "| opencv: " in text
        assert "torchvision: " not in text
    assert "--only mammostream,opencv" in page
    assert str(packed) not in page
    assert report.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_medians_and_ratios_are_taken_round_by_round():
    def turns(*rates):
        return [bench.Turn(rate, cpu_ms=1000 / rate, memory_gib=0.5) for rate in rates]

    table = bench.table({"mammostream": turns(100, 10, 30), "opencv": turns(50, 4, 10), "decode only": turns(900, 90, 300)})
    ours, rival, part = table.splitlines()[2:]
    assert "| 30 | 10-100 | – | 33.33 | 0.50 |" in ours
    assert f"| 10 | 4-50 | {statistics.median([2, 2.5, 3]):.2f}× |" in rival
    assert "| 300 | 90-900 | – |" in part


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--only opencw", "--only opencw: there is no such contender (did you mean 'opencv'?)"),
        ("--output results.txt", "results.txt is no Markdown page"),
        ("--views gone.yaml", "gone.yaml does not exist"),
        ("--split val", "has no tiles of split 'val'"),
        ("--batch-size 100 --only mammostream", "contender 'mammostream': 12 tiles over 1 processes fill no batch of 100"),
    ],
)
def test_bad_input(packed, mammostream, options, message):
    code, _, err = mammostream(f"bench loader --shards {packed} --rounds 1 --seconds 0.05 {options}")
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_the_suggested_fix_for_a_bad_tile_works(packed, tmp_path, mammostream):
    """The error names a command; after running it, the loader reads the remaining tiles."""
    import shutil

    from mammostream.common.errors import BadInput
    from mammostream.shards.archive import read_index

    copy = tmp_path / "shards"
    shutil.copytree(packed, copy)
    (shard,) = open_shards(copy).shards("train")
    bad = read_index(shard.index)[5]
    with shard.tar.open("r+b") as file:
        file.seek(bad[0].offset)
        file.write(b"rubbish" * (bad[0].size // 7))

    def load():
        shards = open_shards(copy)
        return LabelledLoader(shards.shards("train"), batch_size=4, tile_size=48, mean=0, std=1)

    with pytest.raises(BadInput) as caught:
        list(load())
    key, command = bad[0].name.partition(".")[0], str(caught.value).partition("run 'mammostream ")[2].rstrip("'")
    assert f"tile {key} of shard {shard.tar}" in str(caught.value)
    mammostream(command)
    mended = load()
    assert mended.tiles == 11
    assert sum(len(numbers) for _, numbers in mended) == 11
    assert key not in open_shards(copy).tiles()["key"].to_list()
