"""Keys, tars and their DALI index, against tarfile and NVIDIA's wds2idx."""

from __future__ import annotations

import re
import string
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mammostream.common.errors import BadInput
from mammostream.shards.archive import (
    Member,
    check_index,
    escape_id,
    read_index,
    short_name,
    tile_key,
    write_archive,
    write_index,
)

ALLOWED = set(string.ascii_letters + string.digits + "-_%")
EXTENSIONS = ("tif", "num", "json")
WDS2IDX = Path(sys.executable).with_name("wds2idx")

samples_of = st.lists(
    st.tuples(st.text(max_size=60), st.tuples(*[st.binary(max_size=1200)] * 3)), max_size=6, unique_by=lambda sample: sample[0]
)


def with_keys(samples):
    return [(f"k{escape_id(name)}", list(zip(EXTENSIONS, data, strict=True))) for name, data in samples]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("archive")


@given(st.text() | st.text(alphabet="%24/aA."))
@example("a%2Fb")
def test_escaped_ids_have_only_allowed_characters_and_can_be_undone(identifier):
    escaped = escape_id(identifier)
    assert set(escaped) <= ALLOWED
    assert unquote(escaped, errors="strict") == identifier


@given(st.lists(st.text(alphabet="aA0%_-. /é", max_size=5), unique=True, max_size=30))
def test_ids_never_collide(identifiers):
    assert len({escape_id(i) for i in identifiers}) == len(identifiers)


@given(st.lists(st.text(min_size=1, max_size=120), min_size=2, max_size=4, unique=True))
def test_short_names_fit_every_file_system_and_differ(identifiers):
    escaped = [escape_id(i) for i in identifiers]
    short = [short_name(e) for e in escaped]
    assert len(set(short)) == len(short)
    for name, whole in zip(short, escaped, strict=True):
        assert len(name) <= 200
        assert name == whole or len(whole) > 200
        unquote(name, errors="ignore")
    long = [escape_id("Маммография обеих молочных желёз " * 5 + end) for end in "ab"]
    assert short_name(long[0]) != short_name(long[1])
    assert re.fullmatch(r"(?:[A-Za-z0-9_-]|%[0-9A-F]{2})+", short_name(long[0]))


def test_keys_have_no_dot():
    assert tile_key("1.2.840/a b", 5, 70) == "1%2E2%2E840%2Fa%20b_y5_x70"
    assert tile_key("plain-id_1", 0, 0) == "plain-id_1_y0_x0"


@settings(max_examples=40)
@given(samples_of)
def test_archive_is_what_tarfile_reads_and_its_index_says_where(folder, samples):
    tar_path = folder / "a.tar"
    samples = with_keys(samples)
    index = write_archive(tar_path, samples)
    assert read_index(tar_path.with_suffix(".idx")) == index
    check_index(tar_path, index)
    expected = [(f"{key}.{extension}", data) for key, members in samples for extension, data in members]
    flat = [member for sample in index for member in sample]
    with tarfile.open(tar_path) as tar:
        infos = tar.getmembers()
        assert [(i.name, tar.extractfile(i).read()) for i in infos] == expected
        assert [(i.offset_data, i.size, i.name) for i in infos] == [(m.offset, m.size, m.name) for m in flat]
        assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} <= {(0, 0, 0, "", "", 0o444)}
    raw = tar_path.read_bytes()
    assert [raw[m.offset : m.offset + m.size] for m in flat] == [data for _, data in expected]
    assert [len(sample) for sample in index] == [3] * len(samples)


@settings(max_examples=40)
@given(samples_of)
def test_the_same_samples_give_the_same_bytes(folder, samples):
    for name in ("1.tar", "2.tar"):
        write_archive(folder / name, with_keys(samples))
    assert (folder / "1.tar").read_bytes() == (folder / "2.tar").read_bytes()
    assert (folder / "1.idx").read_bytes() == (folder / "2.idx").read_bytes()


def test_index_equals_nvidias(tmp_path):
    samples = [(f"film%2E{i}_y{i}_x0", [("tif", b"x" * (700 * i)), ("num", b"12345678"), ("json", b"{}")]) for i in range(7)]
    write_archive(tmp_path / "a.tar", samples)
    subprocess.run([WDS2IDX, tmp_path / "a.tar", tmp_path / "theirs.idx"], check=True, capture_output=True)
    assert (tmp_path / "a.idx").read_text().split() == (tmp_path / "theirs.idx").read_text().split()


names = st.text(alphabet=string.ascii_letters + "-_%", min_size=1, max_size=20)
members = st.builds(Member, names, st.integers(512, 2**40), st.integers(0, 2**33), names)


@given(index=st.lists(st.lists(members, min_size=1, max_size=4).map(tuple), max_size=6))
def test_index_round_trip(folder, index):
    write_index(folder / "i.idx", index)
    assert read_index(folder / "i.idx") == index


@pytest.mark.parametrize("size_change", [-1, 1, 512])
def test_entry_past_the_end_is_refused(tmp_path, size_change):
    tar_path = tmp_path / "a.tar"
    index = write_archive(tar_path, [("k", [("tif", b"x" * 100)])])
    room = tar_path.stat().st_size - index[0][0].offset
    changed = [(Member("tif", index[0][0].offset, room + size_change, "k.tif"),)]
    if size_change < 0:
        check_index(tar_path, changed)
        return
    with pytest.raises(BadInput, match=r"a\.tar .* does not hold k\.tif"):
        check_index(tar_path, changed)


@pytest.mark.parametrize(("offset", "size"), [(0, 10), (-512, 10), (512, -1), (2**40, 1)])
def test_entry_that_cannot_be_is_refused(tmp_path, offset, size):
    write_archive(tmp_path / "a.tar", [("k", [("tif", b"x" * 100)])])
    with pytest.raises(BadInput, match="does not hold"):
        check_index(tmp_path / "a.tar", [(Member("tif", offset, size, "k.tif"),)])


def test_cut_or_missing_tar_is_refused(tmp_path):
    index = write_archive(tmp_path / "a.tar", [(f"k{i}", [("tif", b"x" * 900)]) for i in range(3)])
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: index[2][0].offset + 899])
    with pytest.raises(BadInput, match="does not hold k2.tif"):
        check_index(tmp_path / "a.tar", index)
    check_index(tmp_path / "a.tar", index[:2])
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BadInput, match="does not exist"):
        check_index(tmp_path / "a.tar", index)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "v1.2\n",
        "v1.1 1\ntif 512 3 k.tif\n",
        "v1.2 2\ntif 512 3 k.tif\n",
        "v1.2 x\ntif 512 3 k.tif\n",
        "v1.2 1\ntif 512 3\n",
        "v1.2 1\ntif 512 x k.tif\n",
        "v1.2 1\ntif 512 3 k.tif\n\n",
        "v1.2 1\ntif 512 3 ü.tif\n",
    ],
)
def test_damaged_index_is_refused_by_name(tmp_path, text):
    (tmp_path / "a.idx").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=r"index .*a\.idx is damaged"):
        read_index(tmp_path / "a.idx")


def test_missing_index_is_refused(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        read_index(tmp_path / "a.idx")


def test_failed_write_leaves_no_tar(tmp_path):
    def broken():
        yield "k", [("tif", b"x")]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_archive(tmp_path / "a.tar", broken())
    assert list(tmp_path.iterdir()) == []
