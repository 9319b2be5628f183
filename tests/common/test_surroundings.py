"""What a container or a scheduler may lack: a log that holds every character, a user's name, shared memory."""

from __future__ import annotations

import getpass
import io
import os
import resource
import sys
import tempfile
from pathlib import Path

import click
import pytest

from mammostream.common.parallel import available_cpus, map_processes
from mammostream.common.surroundings import describe_surroundings, make_do, shared_memory_fault, usable_workers
from mammostream.shards.build.launch import LaunchConfig, Launcher

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


def own_process(_):
    return os.getpid()


@pytest.mark.parametrize(
    ("encoding", "errors", "written"),
    [
        ("latin-1", "strict", "? Tumör"),
        ("ascii", "strict", "? Tum?r"),
        ("ascii", "surrogateescape", "? Tum?r"),
        ("utf-8", "strict", "📸 Tumör"),
    ],
)
def test_what_a_log_cannot_hold_is_replaced(encoding, errors, written, monkeypatch):
    log = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(log, encoding=encoding, errors=errors, write_through=True))
    make_do()
    print("📸 Tumör")
    click.echo("📸 Tumör")
    sys.stdout.flush()
    by_print, by_click = log.getvalue().splitlines()
    assert by_print.decode(encoding) == written
    assert by_click.decode("utf-8" if encoding == "ascii" else encoding) in (written, "📸 Tumör")  # click knows no ASCII
    assert ("is replaced" in describe_surroundings()["output"]) == (encoding != "utf-8")


def test_a_user_without_a_passwd_entry_gets_a_name_and_a_home(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in (*NAMES, "HOME"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    with pytest.raises(RuntimeError):
        Path.home()
    make_do()
    assert getpass.getuser() == "uid2147483641"
    assert Path.home().parent == tmp_path
    assert Path.home().is_dir()
    assert "2147483641, which has no passwd entry" in describe_surroundings()["user"]
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    assert "none, not writable: set HOME" in describe_surroundings()["home"]


@pytest.fixture
def no_shared_memory():
    """The kernel lets this process write no file, so that a lock cannot be made, as where /dev/shm may only be read."""
    for found in (shared_memory_fault, usable_workers):
        found.cache_clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        shared_memory_fault()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    yield
    for found in (shared_memory_fault, usable_workers):
        found.cache_clear()


def test_without_shared_memory_one_process_works(no_shared_memory, capsys):
    assert set(map_processes(own_process, [1, 2, 3], 2, "working", "item")) == {os.getpid()}
    launcher = Launcher.of(LaunchConfig(workers=2))
    assert (launcher.workers, launcher.threads) == (1, available_cpus())
    assert list(launcher.run(own_process, [1, 2])) == [os.getpid()] * 2
    said = capsys.readouterr().err
    assert said.count("no shared memory here (/dev/shm: ") == 1
    assert "one process does the work" in said
    assert describe_surroundings()["shared memory"].startswith("no shared memory here")


def test_with_shared_memory_several_do():
    assert usable_workers(2) == 2
    assert describe_surroundings()["shared memory"] == "yes"
