"""Temporary files of killed processes go, those of living ones stay."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import click
import pytest

from mammostream.common.files import whole_file, write_text
from mammostream.common.options import Command
from mammostream.common.temporaries import new_command, remove_leftovers, scratch_folder, spool_file, temporary_name

DAY = 24 * 3600
WRITER = """
import sys, time
from pathlib import Path
from mammostream.common.files import whole_file
from mammostream.common.temporaries import scratch_folder
folder = Path(sys.argv[1])
scratch = scratch_folder(folder)
(Path(scratch.name) / "inside").touch()
with whole_file(folder / "last.pth") as temporary:
    temporary.write_bytes(b"half")
    print(flush=True)
    time.sleep(60)
"""


@contextmanager
def writing_process(folder):
    """A process in the midst of a file, with a scratch folder."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, folder], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def sweep(folder):
    new_command()
    remove_leftovers(folder)


@pytest.mark.parametrize("reaped", [True, False])
def test_what_a_killed_writer_left_goes_with_the_next_file_of_its_folder(tmp_path, reaped):
    with writing_process(tmp_path) as process:
        write_text(tmp_path / "mine", "x")
        left = [name for name in names(tmp_path) if name.endswith(".tmp")]
        assert len(left) == 2, "a living process's file and folder stay"
        process.kill()
        if reaped:
            process.wait()
        else:  # its parent has not asked how it ended: the kernel keeps its number
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        new_command()
        write_text(tmp_path / "mine", "y")
        assert names(tmp_path) == ["mine"]


def test_each_command_looks_anew(tmp_path):
    @click.command(cls=Command)
    def command():
        write_text(tmp_path / "result", "x")

    command.main([], standalone_mode=False)
    with writing_process(tmp_path):
        pass
    assert len(names(tmp_path)) == 3
    command.main([], standalone_mode=False)
    assert names(tmp_path) == ["result"]


def aged(path, seconds):
    path.touch()
    os.utime(path, (time.time() - seconds,) * 2)
    return path.name


def test_a_file_older_than_the_process_that_now_has_its_number_goes(tmp_path):
    aged(tmp_path / temporary_name("a"), 300 * DAY)
    kept = aged(tmp_path / temporary_name("b"), 0)
    sweep(tmp_path)
    assert names(tmp_path) == [kept]


OWNERS = {"our number": f"{os.getpid()}-00000000", "another": "4711-00000000", "old name": "4711"}


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
def test_files_of_other_machines_and_of_older_versions_go_by_age(tmp_path, owner):
    aged(tmp_path / f".old.pth.{owner}.tmp", 1.1 * DAY)
    young = aged(tmp_path / f".young.pth.{owner}.tmp", 0.9 * DAY)
    folder = tmp_path / f".folder.{owner}.tmp"
    folder.mkdir()
    os.utime(folder, (0, 0))
    sweep(tmp_path)
    assert names(tmp_path) == sorted([young, folder.name])


def test_files_of_others_stay(tmp_path):
    others = [aged(tmp_path / name, 300 * DAY) for name in (".x.tmp", "x.4711.tmp", ".x.4711", ".x.4711-1234.tmp", ".lock")]
    sweep(tmp_path)
    assert names(tmp_path) == sorted(others)


def test_a_folder_that_cannot_be_looked_at_is_no_error(tmp_path):
    sweep(tmp_path / "missing")


def test_names_as_long_as_a_disk_takes_can_be_written(tmp_path):
    for name in ("x" * 255, "ä" * 127):
        write_text(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name
    with whole_file(tmp_path / ("x" * 254 + "1")) as one, whole_file(tmp_path / ("x" * 254 + "2")) as other:
        assert one != other
        one.touch()
        other.touch()


def test_scratch_folders_and_spools_say_whose_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ending = re.escape(temporary_name("x").removeprefix(".x"))
    with scratch_folder() as folder:
        assert re.fullmatch(rf"\.mammostream\..*{ending}", Path(folder).name)
        assert Path(folder).parent == tmp_path
        sweep(tmp_path)
        assert Path(folder).is_dir()
    with spool_file(tmp_path / "train-000000") as spool:
        spool.write(b"x")
    assert names(tmp_path) == []
