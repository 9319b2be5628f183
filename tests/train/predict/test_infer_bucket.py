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

from mammostream.dali_pipelines import PretrainLoader
from mammostream.shards import open_shards
from mammostream.shards.archive import read_index

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


def test_a_truncated_or_missing_object_is_rows_with_their_reason(
    server, shard_set, sharp_classifier, mammostream, finetuned, tmp_path
):
    damaged = tmp_path / "damaged"
    shutil.copytree(shard_set, damaged)
    index = read_index(damaged / "val-000000.idx")
    tar = damaged / "val-000000.tar"
    tar.write_bytes(tar.read_bytes()[: index[6][0].offset + 1])
    (damaged / "val-000002.tar").unlink()
    place = server.upload(damaged, "damaged")
    outcome = mammostream(
        f"infer --model-path {sharp_classifier} --shards {place} --output-dir {tmp_path}/out --device cpu --max-bad 17"
    )
    assert outcome.code == 0, outcome.err
    tiles = predictions(tmp_path / "out")
    bad = tiles[tiles["reason"] != ""]
    assert len(bad) == 3 + 14
    assert bad["reason"].str.contains("cut short").sum() == 3
    assert bad["reason"].str.contains(f"{place}/val-000002.tar does not exist").sum() == 14
    good = tiles.loc[tiles["reason"] == "", [f"prob:{name}" for name in finetuned.classes]]
    assert len(good) == 11
    assert good.notna().all(axis=None)


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


def test_a_server_that_goes_is_one_line_and_finished_parts_stay(
    server, finetuned, sharp_classifier, run_cli, single_thread_environment, tmp_path
):
    shards = write_set(open_shards(finetuned.shards), tmp_path / "set", (40,) * 6)
    run_cli(f"infer --model-path {sharp_classifier} --shards {shards} --output-dir {tmp_path}/whole --device cpu")
    place = server.upload(shards, "going")
    folder = tmp_path / "out"
    line = f"-m mammostream infer --model-path {sharp_classifier} --shards {place} --output-dir {folder} --device cpu".split()
    environment = single_thread_environment | server.environment
    child = Child([sys.executable, *line], tmp_path / "log", environment)
    child.wait_until(lambda: list((folder / "parts").glob("val-0000*[0-9].parquet")))
    server.kill()
    assert child.end() == 2, child.said
    error = child.said.rpartition("error: ")[2].strip()
    assert "\n" not in error
    assert f"bucket {BUCKET}" in error
    assert f"AWS_ENDPOINT_URL {server.environment['AWS_ENDPOINT_URL']} does not answer" in error
    finished = list((folder / "parts").glob("val-0000*[0-9].parquet"))
    assert 0 < len(finished) < 6
    server.start()
    run_cli(f"infer --model-path {sharp_classifier} --shards {place} --output-dir {folder} --device cpu")
    for name in ("predictions", "image_predictions", "breast_predictions"):
        one, other = ((place / f"{name}.parquet").read_bytes() for place in (folder, tmp_path / "whole"))
        assert one == other
