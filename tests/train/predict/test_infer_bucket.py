"""Shards in a bucket of a real S3 server on this machine: the same answers, damage, refusals, and a server that goes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow.fs
import pytest
import torch
from processes import Child
from shard_sets import write_set

from mammostream.common.buckets import PATIENCE
from mammostream.dali_pipelines import PretrainLoader
from mammostream.shards import open_shards
from mammostream.shards.archive import read_index
from mammostream.train.predict.readable_tiles import ShardTiles

KEYS = '{"identities": [{"name": "t", "credentials": [{"accessKey": "key", "secretKey": "secret"}], "actions": ["Admin"]}]}'
BUCKET = "films"


def free_ports(count: int) -> list[int]:
    """Return ports that are free, as are those 10,000 above them, which the server takes too."""
    found: list[int] = []
    for port in range(21000 + os.getpid() % 9000, 40000, 7):
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


class Server:
    """A SeaweedFS server that can be killed and started again with what it holds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        master, volume, filer, self.port = free_ports(4)
        (folder / "keys.json").write_text(KEYS)
        (folder / "data").mkdir()
        self._command = [
            Path(sys.executable).with_name("weed"),
            "server",
            f"-dir={folder}/data",
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", f"-s3.config={folder}/keys.json", "-master.telemetry=false"),
            *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={self.port}"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=64", "-volume.max=4"),
        ]

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "3",
            "MAMMOSTREAM_CACHE": str(self._folder / "cache"),
            "MAMMOSTREAM_BUCKET_PATIENCE": "60",
        }

    def client(self) -> pyarrow.fs.S3FileSystem:
        return pyarrow.fs.S3FileSystem(
            access_key="key",
            secret_key="secret",
            endpoint_override=self.environment["AWS_ENDPOINT_URL"],
            region="us-east-1",
            allow_bucket_creation=True,
        )

    def start(self) -> None:
        self._child = Child(self._command, self._folder / "server.log", dict(os.environ))
        self._child.wait_until(self._answers, 60)

    def _answers(self) -> bool:
        try:
            client = self.client()
            client.create_dir(BUCKET)
            with client.open_output_stream(f"{BUCKET}/ready") as file:
                file.write(b"yes")
        except OSError:
            time.sleep(0.2)
            return False
        return True

    def kill(self) -> None:
        self._child.process.send_signal(signal.SIGKILL)
        self._child.end()

    def upload(self, folder: Path, prefix: str) -> str:
        """Copy a folder's files below a prefix and return its place."""
        client = self.client()
        for path in folder.iterdir():
            with client.open_output_stream(f"{BUCKET}/{prefix}/{path.name}") as file:
                file.write(path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def listing(self, place: str) -> list[tuple]:
        found = self.client().get_file_info(pyarrow.fs.FileSelector(place.removeprefix("s3://")))
        return [(info.path, info.size, info.mtime_ns) for info in found]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running server whose place and keys are in the environment."""
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
    server.kill()


@pytest.fixture(scope="module")
def shard_set(finetuned, tmp_path_factory):
    return write_set(open_shards(finetuned.shards), tmp_path_factory.mktemp("set"), (9, 0, 14, 5))


def predictions(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "predictions.parquet").set_index("key")


def test_a_bucket_and_a_disk_give_the_same_bytes(server, shard_set, sharp_classifier, run_cli, tmp_path):
    place = server.upload(shard_set, "same")
    for shards, folder in ((shard_set, "disk"), (place, "bucket")):
        run_cli(f"infer --model-path {sharp_classifier} --shards {shards} --output-dir {tmp_path}/{folder} --device cpu")
    for name in ("predictions", "image_predictions", "breast_predictions"):
        one, other = ((tmp_path / folder / f"{name}.parquet").read_bytes() for folder in ("disk", "bucket"))
        assert one == other
    assert len(predictions(tmp_path / "bucket")) == 28


def test_training_reads_a_bucket_as_it_reads_a_disk(server, shard_set, tmp_path):
    place = server.upload(shard_set, "training")
    batches = []
    for shards in (open_shards(shard_set), open_shards(place)):
        options = {"batch_size": 8, "tile_size": shards.preprocessing["tile_size"], "mean": 0.4, "std": 0.2, "initial_fill": 8}
        batches.append(list(PretrainLoader(shards.shards("val"), tiles=shards.tiles()["tile"][2:], **options)))
    assert len(batches[0]) == len(batches[1]) == 3
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_damaged_truncated_or_missing_object_is_rows_with_their_reason(
    server, shard_set, sharp_classifier, mammostream, finetuned, tmp_path
):
    damaged = tmp_path / "damaged"
    shutil.copytree(shard_set, damaged)
    index = read_index(damaged / "val-000000.idx")
    tar = damaged / "val-000000.tar"
    data = bytearray(tar.read_bytes()[: index[6][0].offset + 1])
    spoilt = next(member for member in index[1] if member.extension == "tif")
    data[spoilt.offset : spoilt.offset + spoilt.size] = bytes(spoilt.size)
    tar.write_bytes(data)
    (damaged / "val-000002.tar").unlink()
    place = server.upload(damaged, "damaged")
    outcome = mammostream(
        f"infer --model-path {sharp_classifier} --shards {place} --output-dir {tmp_path}/out --device cpu --max-bad 18"
    )
    assert outcome.code == 0, outcome.err
    tiles = predictions(tmp_path / "out")
    bad = tiles[tiles["reason"] != ""]
    assert len(bad) == 1 + 3 + 14
    assert bad["reason"].str.contains("cannot be decoded").sum() == 1
    assert bad["reason"].str.contains("cut short").sum() == 3
    assert bad["reason"].str.contains(f"{place}/val-000002.tar does not exist").sum() == 14
    good = tiles.loc[tiles["reason"] == "", [f"prob:{name}" for name in finetuned.classes]]
    assert len(good) == 10
    assert good.notna().all(axis=None)


def test_an_object_removed_while_it_is_read_is_rows_with_their_reason(server, finetuned, tmp_path):
    place = server.upload(write_set(open_shards(finetuned.shards), tmp_path / "set", (40,)), "removed")
    opened = open_shards(place)
    options = {"batch_size": 4, "tile_size": opened.preprocessing["tile_size"], "mean": 0.4, "std": 0.2, "device": "cpu"}
    tiles = ShardTiles(opened.shards()[0], {}, **options)
    batches = iter(tiles)
    read = len(next(batches)[0])
    server.client().delete_file(f"{BUCKET}/removed/val-000000.tar")
    read += sum(len(keys) for keys, _, _ in batches)
    assert 4 <= read < 40
    assert len(tiles.faults) == 40 - read
    assert set(tiles.faults.values()) == {f"shard {place}/val-000000.tar does not exist"}


def test_what_is_not_there_or_forbidden_is_one_line(server, sharp_classifier, mammostream, monkeypatch, tmp_path):
    predict = f"infer --model-path {sharp_classifier} --output-dir {tmp_path}/out --device cpu --shards"
    outcome = mammostream(f"{predict} s3://{BUCKET}/nowhere")
    assert outcome.code == 2
    assert f"s3://{BUCKET}/nowhere/shards.json does not exist" in outcome.error
    from mammostream.common import buckets

    buckets._file_system.cache_clear()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    outcome = mammostream(f"{predict} s3://{BUCKET}/same")
    buckets._file_system.cache_clear()
    assert outcome.code == 2
    assert "may not be read" in outcome.error
    assert "AWS_SECRET_ACCESS_KEY" in outcome.error


@pytest.fixture(scope="module")
def long_set(server, finetuned, sharp_classifier, tmp_path_factory):
    """Six shards on a disk and in a bucket, what is predicted from the disk, and the start of a command line on the bucket."""
    from mammostream.cli import cli

    folder = tmp_path_factory.mktemp("long")
    shards = write_set(open_shards(finetuned.shards), folder / "set", (40,) * 6)
    start = f"-m mammostream infer --model-path {sharp_classifier} --device cpu"
    line = f"{start} --shards {shards} --output-dir {folder}/whole".split()
    cli.main(line[2:], standalone_mode=False)
    place = server.upload(shards, "going")
    return folder / "whole", [sys.executable, *start.split(), "--shards", place]


def finished_parts(folder: Path) -> list[Path]:
    return list((folder / "parts").glob("val-0000*[0-9].parquet"))


def assert_same_predictions(one: Path, other: Path) -> None:
    for name in ("predictions", "image_predictions", "breast_predictions"):
        assert (one / f"{name}.parquet").read_bytes() == (other / f"{name}.parquet").read_bytes()


def test_a_server_that_goes_for_good_is_one_line_and_finished_parts_stay(
    server, long_set, single_thread_environment, run_cli, mammostream, tmp_path
):
    whole, line = long_set
    folder = tmp_path / "out"
    environment = single_thread_environment | server.environment
    with Child([*line, "--output-dir", folder], tmp_path / "log", environment | {PATIENCE: "1"}) as child:
        child.wait_until(lambda: finished_parts(folder))
        server.kill()
        assert child.end() == 2, child.said
    error = child.said.rpartition("error: ")[2].strip()
    assert "\n" not in error
    assert f"bucket {BUCKET}" in error
    assert f"AWS_ENDPOINT_URL {server.environment['AWS_ENDPOINT_URL']} does not answer" in error
    assert 0 < len(finished_parts(folder)) < 6
    outcome = mammostream(f"shards info {line[-1]}")
    assert outcome.code == 2
    assert "does not answer" in outcome.error
    assert "trying again" not in outcome.err  # what has not answered yet is not waited for
    server.start()
    run_cli(" ".join(map(str, [*line[3:], "--output-dir", folder])))
    assert_same_predictions(folder, whole)


def test_a_server_that_comes_back_is_waited_for(server, long_set, single_thread_environment, tmp_path):
    whole, line = long_set
    folder = tmp_path / "out"
    environment = single_thread_environment | server.environment
    with Child([*line, "--output-dir", folder], tmp_path / "log", environment) as child:
        child.wait_until(lambda: finished_parts(folder))
        server.kill()
        child.wait_until(lambda: "trying again in 2 s" in child.said)  # the second pause
        server.start()
        assert child.end() == 0, child.said
    assert f"AWS_ENDPOINT_URL {server.environment['AWS_ENDPOINT_URL']} does not answer" in child.said
    assert "for 60 s more (MAMMOSTREAM_BUCKET_PATIENCE)" in child.said
    assert_same_predictions(folder, whole)


def test_shards_are_described_verified_and_unpacked_as_on_a_disk(server, finetuned, mammostream, tmp_path):
    place = server.upload(finetuned.shards, "commands")
    for command, workers in (("info", ("", "")), ("verify", ("--workers 1", "--workers 2"))):
        said = [
            mammostream(f"shards {command} {shards} {of}")
            for shards, of in zip((finetuned.shards, place), workers, strict=True)
        ]
        assert [outcome.code for outcome in said] == [0, 0], said
        assert said[0].out == said[1].out != ""
    for folder, shards in (("disk", finetuned.shards), ("bucket", place)):
        outcome = mammostream(f"shards unpack {shards} --output-dir {tmp_path}/{folder} --workers 1")
        assert outcome.code == 0, outcome.err
    files = sorted(path.name for path in (tmp_path / "disk").iterdir())
    assert len(files) == 96 + 2
    assert files == sorted(path.name for path in (tmp_path / "bucket").iterdir())
    assert all((tmp_path / "disk" / name).read_bytes() == (tmp_path / "bucket" / name).read_bytes() for name in files)
    tars = [path for path in Path(os.environ["MAMMOSTREAM_CACHE"]).rglob("*") if path.suffix in (".tar", ".tmp")]
    assert not tars  # nothing large is left in the cache


def test_damage_in_a_bucket_is_found_and_left_as_it_is(server, finetuned, mammostream, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(finetuned.shards, damaged)
    index = read_index(damaged / "train-000000.idx")
    tar = damaged / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[index[3][0].offset + 9] ^= 255
    tar.write_bytes(data)
    (damaged / "val-000000.tar").unlink()
    (damaged / "images.parquet").write_bytes(b"no table")
    place = server.upload(damaged, "verified")
    faults = []
    for shards in (damaged, place):
        outcome = mammostream(f"shards verify {shards} --workers 1")
        assert outcome.code == 2, outcome.err
        faults.append([line.replace(str(shards), "X") for line in outcome.err.splitlines() if line.startswith("fault: ")])
    # Where a table that is not there was looked for, Arrow says in its own words.
    assert [line.partition(" (")[0] for line in faults[0]] == [line.partition(" (")[0] for line in faults[1]]
    assert len(faults[0]) == 3
    assert "upload the shards named above again" in outcome.error
    before = server.listing(place)
    outcome = mammostream(f"shards verify {place} --workers 1 --quarantine")
    assert outcome.code == 2
    assert f"{place} lies in a bucket, which is only read; copy it to a disk" in outcome.error
    assert "fault:" not in outcome.err
    assert server.listing(place) == before
    outcome = mammostream(f"shards unpack {place} --output-dir {tmp_path}/out --workers 1")
    assert outcome.code == 2
    assert place in outcome.error


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("shards finish s3://films/x", "SHARDS"),
        ("shards build --manifest m.parquet --output-dir s3://films/x", "--output-dir"),
        ("shards build --manifest s3://films/m.parquet --output-dir x", "--manifest"),
        ("shards unpack shards --output-dir s3://films/x", "--output-dir"),
        ("shards pack --csv s3://films/x.csv --tiles-dir x --output-dir y", "--csv"),
        ("prepare --images-root s3://films --output-dir x", "--images-root"),
        ("infer --model-path s3://films/m.pth --shards x --output-dir y", "--model-path"),
    ],
)
def test_what_only_a_disk_can_do_is_refused(line, flag, mammostream, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    outcome = mammostream(line)
    assert outcome.code == 2
    assert outcome.error.startswith(f"{flag} s3://films")
    assert "lies in a bucket" in outcome.error
    assert not list(tmp_path.iterdir())
