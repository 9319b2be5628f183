"""What `bench build` measures."""

from __future__ import annotations

import re

import pytest

from mammostream.shards.build.bench import STAGES, measure_build
from mammostream.shards.build.launch import Launcher
from mammostream.shards.manifest import read_manifest


def test_speeds_are_of_all_films_and_tiles(manifest, built):
    rows = read_manifest(manifest)
    speed = measure_build(rows, built.plan.config, Launcher(threads=1), rounds=1)
    tiles = len(built.shards.tiles())
    assert speed.tiles_per_second / speed.films_per_second == pytest.approx(tiles / len(rows))
    assert list(speed.stages) == list(STAGES)
    assert min(speed.stages.values()) > 0
    # One thread overlaps next to nothing: the stages are most of the whole, and not many times as much.
    assert 0.2 < sum(speed.stages.values()) * speed.films_per_second < 5


def test_the_command_prints_a_table_and_keeps_nothing(call, manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    options = ["--tile-size", "64", "--stride", "48", "--device", "cpu", "--films", "3", "--rounds", "1"]
    code, out, err = call("bench", "build", "--manifest", manifest, *options)
    assert code == 0, err
    assert "3 films, " in out
    header, _, row = [line for line in out.splitlines() if line.startswith("|")]
    assert header.count("|") == row.count("|") == 4 + len(STAGES)
    numbers = [float(cell) for cell in re.findall(r"(?<=\| )[\d.]+(?= \|)", row)]
    assert len(numbers) == 2 + len(STAGES)
    assert numbers[0] > 0
    assert list(tmp_path.iterdir()) == []
