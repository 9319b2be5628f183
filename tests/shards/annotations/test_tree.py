"""Which files below a folder are images, and which links are followed."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.folder import find_images
from mammostream.shards.annotations.tree import ImageTree

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 40)).astype(np.uint8)


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS).save(path)
    return path


def names(tree):
    return [path.relative_to(tree.root).as_posix() for path in tree.paths]


def test_images_are_told_by_ending_in_any_case_or_by_content(tmp_path, write_dicom):
    for name in ("a.jpg", "b.JPEG", "c.Png", "d.bmp", "e.webp", "f.jp2", "g.TIF", "h.pgm"):
        image(tmp_path / name)
    for name in ("i.dcm", "j.IMA", "k.dicom", "DICOM/PA000001/ST000001/SE000001/IM000001", "1.2.840.1", "L MLO.Series 2"):
        write_dicom(tmp_path / name, PIXELS)
    for name in ("notes", "notes.txt", "1.2.3"):
        (tmp_path / name).write_text("no image")
    tree = ImageTree.scan(tmp_path)
    assert len(tree.paths) == 14
    assert tree.ignored == {"none": 2, ".txt": 1}
    assert set(find_images(tmp_path)) >= {"IM000001", "1.2.840.1", "L MLO.Series 2", "j", "b"}


def test_what_is_left_out_is_counted(tmp_path, write_dicom):
    image(tmp_path / "film.png")
    for name in ("DICOMDIR", "CD2/dicomdir"):
        write_dicom(tmp_path / name, PIXELS)
    for name in ("._film.png", "CD2/._film.dcm", "Thumbs.db", "CD2/Thumbs.db", ".DS_Store", "a.html"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / ".git").mkdir()
    tree = ImageTree.scan(tmp_path)
    assert names(tree) == ["film.png"]
    expected = {"DICOMDIR": 1, "dicomdir": 1, "._*": 2, "Thumbs.db": 2, ".DS_Store": 1, ".html": 1, ".git/": 1}
    assert tree.ignored == expected


def test_previews_next_to_films_are_left_out_and_named(tmp_path, write_dicom):
    write_dicom(tmp_path / "a/film.dcm", PIXELS)
    image(tmp_path / "a/film.jpg")
    write_dicom(tmp_path / "a/1.2.3", PIXELS)
    image(tmp_path / "a/1.2.3.bmp")
    image(tmp_path / "b/film.jpg")
    tree = ImageTree.scan(tmp_path)
    assert names(tree) == ["a/1.2.3", "a/film.dcm", "b/film.jpg"]
    assert [problem.kind for problem in tree.problems] == ["copy", "copy"]
    assert tree.problems[1].message == f"image {tmp_path}/a/film.jpg is left out: film.dcm next to it has the same name"


@pytest.fixture
def linked(tmp_path):
    """Images that are links out of their folder, as Hugging Face's cache, DVC and git-annex lay them out."""
    root = tmp_path / "snapshots"
    blob = image(tmp_path / "blobs/0f3a.png").rename(tmp_path / "blobs/0f3a")
    (root / "films").mkdir(parents=True)
    (root / "films/P1.png").symlink_to(os.path.relpath(blob, root / "films"))
    image(tmp_path / "store/deep/P2.png")
    (root / "more").symlink_to(tmp_path / "store")
    (root / "again").symlink_to(tmp_path / "store/deep")
    (tmp_path / "store/up").symlink_to(root)  # round in a circle
    return root


def test_links_are_followed_where_asked_for(linked):
    tree = ImageTree.scan(linked)
    assert names(tree) == ["films/P1.png"]
    assert [problem.kind for problem in tree.problems] == ["not searched"] * 2
    assert "give --follow-links to search it" in tree.problems[0].message
    with pytest.raises(BadInput, match=r"here: .*P1.png is a link to .*0f3a, outside --images-root .*; give --follow-links"):
        tree.find(("P1",), "here")
    tree = ImageTree.scan(linked, follow_links=True)
    # Each folder once, though two links and a circle lead there.
    assert names(tree) == ["again/P2.png", "films/P1.png"]
    assert tree.problems == ()
    assert tree.find(("P1",), "here") == linked / "films/P1.png"
    assert list(find_images(linked, follow_links=True)) == ["P2", "P1"]


def test_an_output_folder_behind_a_link_is_not_searched(linked, tmp_path):
    tree = ImageTree.scan(linked, skip=tmp_path / "store/deep", follow_links=True)
    assert names(tree) == ["films/P1.png"]


def test_a_folder_of_links_alone_names_the_flag(linked):
    (linked / "films/P1.png").unlink()
    with pytest.raises(BadInput, match=r"holds no images; .*again is a link; give --follow-links"):
        ImageTree.scan(linked)
