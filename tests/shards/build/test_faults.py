"""What goes wrong in a build: killed processes, full and read-only disks, two builds at once, films that are none."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mammostream.common.errors import BadInput
from mammostream.common.temporaries import temporary_name
from mammostream.shards import codecs
from mammostream.shards.build.build import build_all, build_shard
from mammostream.shards.build.launch import Launcher
from mammostream.shards.build.merge import finish
from mammostream.shards.build.plan import make_plan
from mammostream.shards.build.verify import verify_shards
from mammostream.shards.lock import ALL, lock_shards
from mammostream.shards.manifest import read_manifest, write_manifest
from mammostream.shards.reading import open_shards

TILING = ["--tile-size", "64", "--stride", "48", "--images-per-shard", "2", "--device", "cpu"]


def command(manifest, directory, *more):
    build = ["shards", "build", "--manifest", manifest, "--output-dir", directory, *TILING, *more]
    return [sys.executable, "-m", "mammostream", *map(str, build)]


def run(*arguments, **options):
    return subprocess.run(*arguments, capture_output=True, text=True, check=False, timeout=120, **options)


def wait_for(condition, process=None):
    deadline = time.monotonic() + 60
    while not condition():
        assert process is None or process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def one_line(done, code=2):
    """Check that a command ended with one clear line, and return it."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert len(lines) == 1, done.stderr
    return lines[0]


def without_record(files):
    """Leave out the record of the command, which differs between commands."""
    return {name: data for name, data in files.items() if name != "config.yaml"}


def everything(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def workers_of(process):
    """Return the process ids of a running build's workers."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(p) for p in children if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    except OSError:
        return []


# Processes that are killed


def test_killed_at_random_moments_and_finished(manifest, build_at, tmp_path):
    """The parent of two workers is killed with signal 9 three times; what has its name then is whole, and a rerun ends it."""
    rng = random.Random(0)
    expected = everything(build_at(tmp_path / "undisturbed", images_per_shard=1).shards.directory)
    directory = tmp_path / "s"
    arguments = command(manifest, directory, "--images-per-shard", "1", "--workers", "2", "--threads", "2")
    for finished in (0, 2, 5):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # From the first file on: before that there is nothing to lose.
        wait_for(lambda: list(directory.glob(".*.tmp")), process)
        wait_for(lambda finished=finished: len(list(directory.glob("*-*.parquet"))) >= finished, process)
        time.sleep(rng.uniform(0, 0.03))
        workers = workers_of(process)
        process.kill()
        process.wait()
        wait_for(lambda workers=workers: not any(Path(f"/proc/{p}/exe").exists() for p in workers))
        there = {name: data for name, data in everything(directory).items() if not name.startswith(".")}
        assert all(expected[name] == data for name, data in there.items())
    assert run(arguments).returncode == 0
    assert without_record(everything(directory)) == expected


def test_workers_killed_while_they_start(manifest, tmp_path):
    for pause in (0, 0.1, 0.4):
        arguments = command(manifest, tmp_path / "s", "--workers", "2")
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(lambda process=process: workers_of(process), process)
        time.sleep(pause)
        os.kill(workers_of(process)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        done = subprocess.CompletedProcess(arguments, process.returncode, "", errors)
        assert "a worker process was killed" in one_line(done)


def test_ctrl_c_stops_at_once(manifest, tmp_path):
    arguments = command(manifest, tmp_path / "s", "--workers", "2")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: list((tmp_path / "s").glob(".train-*.tmp")), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped"
    assert "Traceback" not in errors


def test_what_killed_builds_left_is_removed_but_not_of_other_machines(built, tmp_path):
    plan = replace(built.plan, output_dir=tmp_path)
    mine = temporary_name("train-000000.tar")
    other = ".train-000000.tar.4711-00000000.tmp"
    for name in (mine, other):
        (tmp_path / name).touch()
    os.utime(tmp_path / mine, (0, 0))  # before this process was there
    build_all(plan.select("train"))
    assert [path.name for path in tmp_path.glob(".*")] == [other]


# Two builds at once


@contextmanager
def holding(directory, shards, tmp_path):
    """Another process that holds the lock of some shards, until the end."""
    code = f"""
import time
from pathlib import Path
from mammostream.shards.lock import lock_shards
with lock_shards(Path({str(directory)!r}), {shards!r}):
    Path({str(tmp_path / "held")!r}).touch()
    time.sleep(100)
"""
    (tmp_path / "held").unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_for((tmp_path / "held").exists, process)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_build_is_refused_and_told_by_whom(manifest, build_at, built, tmp_path):
    directory = tmp_path / "s"
    directory.mkdir()
    with holding(directory, range(4), tmp_path) as owner:
        said = one_line(run(command(manifest, directory, "--workers", "1")))
        assert re.search(rf"{directory} is being written by process {owner.pid} on \S+, since \d{{4}}-", said)
        assert "stop it" in said
        assert f"delete {directory / '.lock'}" in said
        assert [path.name for path in directory.iterdir()] == [".lock"]
        for shards in (range(3, 9), range(1), ALL):
            with pytest.raises(BadInput, match=f"process {owner.pid} on "), lock_shards(directory, shards):
                pass
    # The owner was killed: nothing needs to be cleared, and nothing is left behind.
    build_at(directory)
    assert everything(directory) == everything(built.shards.directory)


def test_builds_of_other_shards_run_side_by_side(built, tmp_path):
    plan = replace(built.plan, output_dir=tmp_path)
    with holding(tmp_path, range(2, 4), tmp_path) as owner:
        build_all(plan.select(ordinals=range(2)))
        assert (tmp_path / "train-000001.parquet").exists()
        with pytest.raises(BadInput, match=f"process {owner.pid} on "):
            build_all(plan)
        with pytest.raises(BadInput, match="not finished: 2"):  # waits for nobody who builds
            finish(tmp_path)


def test_a_lock_is_released_by_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), lock_shards(tmp_path, range(3)):
            1 / (not (tmp_path / ".lock").exists())
        assert not (tmp_path / ".lock").exists()


# Disks


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 kB, and a function that makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder])
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield folder, lambda: run(["mount", "-o", "remount,size=20m", folder])
    run(["umount", folder])


def test_full_disk(manifest, build_at, built, small_disk):
    folder, enlarge = small_disk
    directory = folder / "s"
    with pytest.raises(BadInput, match=f"cannot write {directory}.*: No space left on device; free some space"):
        build_at(directory)
    assert not list(directory.glob("*.tmp"))
    assert not list(directory.glob(".*"))
    said = one_line(run(command(manifest, directory, "--workers", "2")))
    assert "No space left on device; free some space and run the same command again" in said
    expected = everything(built.shards.directory)
    left = {name: data for name, data in everything(directory).items() if not name.startswith(".")}
    assert all(expected[name] == data for name, data in left.items())
    enlarge()
    build_at(directory)
    assert everything(directory) == expected


def as_nobody(function):
    """Run a function in a forked process without privileges; return what it printed to stderr and its exit code."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        sys.stderr = os.fdopen(writing, "w")  # not pytest's
        code = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            function()
        except SystemExit as ended:
            code = ended.code
        finally:
            sys.stderr.flush()
            os._exit(code or 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    return said, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def public(cropped_films, manifest):
    """A folder that everybody may read, with the films and their manifest."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="mammostream-test-"))
    folder.chmod(0o755)
    shutil.copytree(cropped_films, folder / "films", copy_function=shutil.copyfile)
    (folder / "films").chmod(0o755)
    frame = read_manifest(manifest)
    frame["path"] = [str(folder / "films" / Path(p).name) for p in frame["path"]]
    write_manifest(frame, folder / "manifest.parquet")
    yield folder
    shutil.rmtree(folder)


def test_read_only_output_and_a_folder_that_may_not_be_read(public, tmp_path, monkeypatch, built):
    import mammostream

    hidden = public / "films" / "hidden"
    hidden.mkdir()
    frame = read_manifest(public / "manifest.parquet")
    name = Path(frame.loc[2, "path"]).name
    (public / "films" / name).rename(hidden / name)
    frame.loc[2, "path"] = str(hidden / name)
    write_manifest(frame, public / "manifest.parquet")
    hidden.chmod(0o000)
    for folder, mode in (("closed", 0o555), ("open", 0o777)):
        (public / folder).mkdir()
        (public / folder).chmod(mode)

    def build(folder):
        monkeypatch.setattr(sys, "argv", command(public / "manifest.parquet", folder, "--workers", "1", "--max-bad", "1")[2:])
        return as_nobody(mammostream.main)

    for folder in (public / "closed", public / "closed" / "s"):
        said, code = build(folder)
        assert code == 2, said
        assert re.search(r"error: cannot (write|make the folder) .*: Permission denied; choose another", said)
        assert "Traceback" not in said
    assert list((public / "closed").iterdir()) == []
    said, code = build(public / "open")
    assert code == 0, said
    made = open_shards(public / "open")
    assert verify_shards(made) == []
    reason = made.images().set_index("image_id")["reason"]
    assert re.search("Permission denied|does not exist", reason[frame.loc[2, "image_id"]])  # newer Pythons see no file
    assert (reason != "").sum() == 1


def test_everything_is_synced_before_it_has_its_name(built, tmp_path, monkeypatch):
    """Each file before its renaming, each renaming before the next file's: what a power cut leaves is in order."""
    events = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor):
        real_fsync(descriptor)
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))

    def rename(path, target):
        events.append(("rename", Path(target).name))
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    build_shard(replace(built.plan, output_dir=tmp_path / "s"), 0)
    expected = []
    for name in ("train-000000.tar", "train-000000.idx", "train-000000.parquet"):
        expected += [("sync", temporary_name(name)), ("rename", name), ("sync", "s")]
    assert events == expected


# Films and encoders


def test_files_that_are_no_films_are_rows_with_their_reason(manifest, build_at, films, tmp_path):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    frame = read_manifest(manifest)
    sources = [Path(p) for p in frame["path"]]
    files = {n: tmp_path / name for n, name in enumerate(("cut.png", "empty.png", "nopixels.dcm", "png.dcm", "text.png"))}
    files[0].write_bytes(sources[0].read_bytes()[:5000])
    files[1].touch()
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.Rows, dataset.Columns, dataset.BitsStored, dataset.BitsAllocated = 64, 64, 16, 16
    dataset.save_as(files[2], enforce_file_format=True)
    shutil.copy(sources[3], files[3])
    files[4].write_text("no film at all")
    for n, path in files.items():
        frame.loc[n, "path"] = str(path)
    made = build_at(tmp_path / "s", films=frame)
    assert verify_shards(made.shards) == []
    reasons = made.shards.images().set_index("image_id")["reason"]
    bad = frame["image_id"].iloc[: len(files)]
    assert reasons[bad.iloc[2]] == f"image {bad.iloc[2]} has no pixel data (modality unknown); leave it out"
    assert all(reasons[name].startswith(f"image {name} cannot be read") for name in bad.drop(bad.index[2])), reasons.tolist()
    assert not reasons.str.contains(str(tmp_path)).any()
    assert (reasons.drop(bad) == "").all()
    assert set(made.shards.tiles()["image_id"]) == set(frame["image_id"].iloc[len(files) :])


def test_an_encoder_that_errs_is_caught_before_anything_has_its_name(built, tmp_path, monkeypatch):
    real = codecs.CODECS["tif"]

    def wrong(tile):
        tile = tile.copy()
        tile[5, 5] ^= 1
        return real.encode(tile)

    plan = replace(built.plan, output_dir=tmp_path)
    for encoder in (wrong, lambda tile: real.encode(tile)[:-40], lambda tile: real.encode(tile[:-1])):
        monkeypatch.setitem(codecs.CODECS, "tif", replace(real, encode=encoder))
        with pytest.raises(BadInput, match=r"encoded as \.tif, but an independent decoder"):
            build_shard(plan, 0)
        assert list(tmp_path.iterdir()) == []
    # Every 1000th tile leaves out all but the first of this shard, which is right.
    count = 0

    def wrong_from_the_second_on(tile):
        nonlocal count
        count += 1
        return real.encode(tile) if count == 1 else wrong(tile)

    monkeypatch.setitem(codecs.CODECS, "tif", replace(real, encode=wrong_from_the_second_on))
    assert build_shard(plan, 0, check_every=1000).tiles > 10


@pytest.mark.parametrize("codec", ["png", "jhc", "raw"])
def test_every_codec_is_checked(built, build_at, tmp_path, monkeypatch, codec):
    real = codecs.CODECS[codec]
    frame = np.zeros((64, 64), np.uint16)
    codecs.check_encoded(real.encode(frame), codec, frame)
    other = frame.copy()
    other[63, 63] = 1
    with pytest.raises(BadInput, match="gives other pixels"):
        codecs.check_encoded(real.encode(other), codec, frame)


def test_lossy_tiles_are_checked_against_what_is_decoded(films, build_at, tmp_path):
    from PIL import Image

    from mammostream.shards.prepare.films import prepare_films

    (tmp_path / "images").mkdir()
    film = films[1]
    Image.fromarray((film.pixels[::2, ::2] >> 8).astype(np.uint8)).save(tmp_path / "images" / f"{film.name}.png")
    frame = prepare_films("folder", tmp_path / "images", patient_regex=r"P\d").manifest
    frame = frame.assign(split="train", pixel_spacing_mm=0.4, spacing_source="assumed")
    made = build_at(tmp_path / "s", films=frame, codec="jpg")
    assert len(made.shards.tiles()) > 10
    assert verify_shards(made.shards) == []


def test_a_worker_with_other_libraries_is_refused(built, tmp_path):
    versions = built.plan.recipe["versions"] | {"scikit-image": "0.1"}
    plan = replace(built.plan, output_dir=tmp_path, recipe=built.plan.recipe | {"versions": versions})
    with pytest.raises(BadInput, match=r"this worker has scikit-image \S+, the plan was made with 0\.1"):
        build_shard(plan, 0)
    assert list(tmp_path.iterdir()) == []


def test_shards_of_two_plans_are_not_merged(built, build_at, manifest, contents, tmp_path):
    """As of two jobs of one array that were started with different options."""
    frame = read_manifest(manifest)
    for config, ordinals in ((built.plan.config, range(2)), (replace(built.plan.config, stride=40), range(2, 4))):
        build_all(make_plan(frame, tmp_path, config).select(ordinals=ordinals))
    with pytest.raises(BadInput, match=r"val-000000\.parquet and .*train-000000\.parquet were built with different options"):
        finish(tmp_path)
    assert not (tmp_path / "tiles.parquet").exists()


def test_workers_have_a_gpu_each(tmp_path):
    """What a worker sees of the GPUs is settled before it computes; no GPU is needed to see that."""
    launcher = Launcher(workers=2, gpus=("4", "GPU-7"))
    seen = list(launcher.run(visible_to_me, [0.3, 0.3, 0.3, 0.3]))
    assert set(seen) == {"4", "GPU-7"}


def visible_to_me(seconds):
    time.sleep(seconds)  # long enough that both workers get one
    return os.environ["CUDA_VISIBLE_DEVICES"]
