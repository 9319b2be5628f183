"""mini-MIAS in the form that it is published in: prose, rows of four lengths, an origin at the bottom left."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mammostream.common.errors import BadInput
from mammostream.shards.annotations.datasets import tell_dataset
from mammostream.shards.prepare.films import prepare_films

INFO = """\
INFORMATION:

Words about the columns and the notes come first; a line of them may begin
with a number:

1st column: the film's number.
2) mdb numbers come in pairs.

REFNUM BG CLASS SEVERITY X Y RADIUS
mdb001 G CIRC B 535 425 197
mdb002 G CIRC B 510 290 70
mdb003 D NORM\x20
mdb004 D NORM
mdb005 F CIRC B 470 140 31
mdb005 F SPIC M 500 168 26
mdb059 F CIRC B
mdb213 G CALC M 547 520 45
mdb216 D CALC M *NOTE 3*
mdb218 G MISC B 519 1000 60
"""
FIRST_LINE = INFO.splitlines().index("mdb001 G CIRC B 535 425 197") + 1


@pytest.fixture
def mias(tmp_path):
    for number in (1, 2, 3, 4, 5, 59, 213, 216, 218):
        pixels = np.zeros((1024, 1024), np.uint8)
        pixels[0, 0] = number
        Image.fromarray(pixels).save(tmp_path / f"mdb{number:03d}.pgm")
    (tmp_path / "Info.txt").write_text(INFO)
    return tmp_path


def prepare(root, **options):
    return prepare_films("mias", root, (root / "Info.txt",), **options)


def test_films_patients_and_labels(mias):
    assert tell_dataset((mias / "Info.txt",))[0] == "mias"
    made = prepare(mias, val_fraction=0.2)
    frame = made.manifest.set_index("image_id")
    assert len(frame) == 9
    assert frame.loc[["mdb001", "mdb002", "mdb003"], "laterality"].tolist() == ["R", "L", "R"]
    assert frame["patient_id"].nunique() == 7
    assert frame.loc["mdb001", "patient_id"] == frame.loc["mdb002", "patient_id"] != frame.loc["mdb003", "patient_id"]
    assert frame.loc["mdb003", "patient_id"] == frame.loc["mdb004", "patient_id"]
    assert frame.groupby("patient_id")["split"].nunique().eq(1).all()
    assert set(frame["split"]) == {"train", "val"}
    assert (frame["pixel_spacing_mm"] == 0.2).all()
    assert set(frame["spacing_source"]) == {"dataset"}
    assert set(frame["view"]) == {"MLO"}
    assert set(frame["bits"]) == {8}

    def labels(film):
        return {name.removeprefix("label:") for name in frame if name.startswith("label:") and frame.loc[film, name] == 1}

    assert labels("mdb001") == {"circumscribed_mass", "mass", "benign", "density_fatty_glandular"}
    assert labels("mdb003") == {"normal", "density_dense_glandular"}
    assert labels("mdb005") == {"circumscribed_mass", "spiculated_mass", "mass", "benign", "malignant", "density_fatty"}
    assert labels("mdb216") == {"calcification", "malignant", "density_dense_glandular"}
    assert labels("mdb218") == {"ill_defined_mass", "mass", "benign", "density_fatty_glandular"}
    assert frame[[name for name in frame if name.startswith("label:")]].notna().all(axis=None)


def test_circles_become_boxes_from_the_top_left(mias):
    made = prepare(mias)
    boxes = made.findings[["image_id", "label", "xmin", "ymin", "xmax", "ymax"]].to_numpy().tolist()
    # 425 from below is 1024 - 425 = 599 from above.
    for label in ("circumscribed_mass", "mass", "benign"):
        assert ["mdb001", label, 535 - 197, 599 - 197, 535 + 197, 599 + 197] in boxes
    assert ["mdb005", "spiculated_mass", 474, 830, 526, 882] in boxes
    assert ["mdb213", "malignant", 502, 459, 592, 549] in boxes
    # Clipped at the upper edge.
    assert ["mdb218", "mass", 459, 0, 579, 84] in boxes
    assert {row[0] for row in boxes} == {"mdb001", "mdb002", "mdb005", "mdb213", "mdb218"}
    assert "3 boxes reach out of their film and are clipped to it" in made.notes
    assert [(p.kind, p.message.split(": ")[1]) for p in made.problems] == [
        ("no box", "the CIRC of 'mdb059' has no coordinates"),
        ("no box", "the CALC of 'mdb216' has no coordinates"),
    ]
    assert f"Info.txt line {FIRST_LINE + 6}" in made.problems[0].message


def test_windows_lines_and_other_encodings(mias):
    (mias / "Info.txt").write_bytes(b"\xef\xbb\xbf" + ("Dépôt\n" + INFO).replace("\n", "\r\n").encode("latin-1"))
    assert len(prepare(mias).manifest) == 9


def test_missing_films_are_listed(mias):
    (mias / "mdb001.pgm").unlink()
    made = prepare(mias)
    (missing,) = [p.message for p in made.problems if p.kind == "missing"]
    assert missing == f"{mias}/Info.txt line {FIRST_LINE}: no file for the image 'mdb001' below {mias}"
    assert "mdb001" not in set(made.findings["image_id"])


def test_a_cut_film_is_listed(mias):
    path = mias / "mdb001.pgm"
    path.write_bytes(path.read_bytes()[:-5000])
    made = prepare(mias)
    (unreadable,) = [p.message for p in made.problems if p.kind == "unreadable"]
    assert "mdb001.pgm cannot be read" in unreadable
    assert made.manifest.set_index("image_id").loc["mdb001", "bits"] == 0


def test_films_of_another_size_are_refused(mias):
    Image.fromarray(np.zeros((512, 512), np.uint8)).save(mias / "mdb002.pgm")
    with pytest.raises(BadInput, match="mdb002.pgm is 512 x 512 pixels, but its boxes are for 1024 x 1024"):
        prepare(mias)


@pytest.mark.parametrize("row", ["mdb002 G CIRC B 510 290", "mdb002 G CIRK B 510 290 70", "mdb002 G CIRC B 510 290 sixty"])
def test_a_torn_row_is_named(mias, row):
    (mias / "Info.txt").write_text(INFO.replace("mdb002 G CIRC B 510 290 70", row))
    with pytest.raises(
        BadInput, match=rf"Info.txt line {FIRST_LINE + 1}: '{row}' is no row like 'mdb001 G CIRC B 535 425 197'"
    ):
        prepare(mias)


def test_a_file_without_rows_is_refused(mias):
    (mias / "Info.txt").write_text("nothing here\n")
    with pytest.raises(BadInput, match=r"Info.txt has no rows like"):
        prepare(mias)
    (mias / "Info.txt").unlink()
    with pytest.raises(BadInput, match=r"Info.txt cannot be read: No such file"):
        prepare(mias)


def as_csv(separator, empty):
    rows = [line.strip().split(" ") for line in INFO.splitlines() if line.startswith(("REFNUM", "mdb"))]
    rows = [[*row[:4], " ".join(row[4:])] if "*NOTE" in row else row for row in rows]
    return "\n".join(separator.join([*row, *[empty] * (7 - len(row))]) for row in rows) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        as_csv(",", ""),
        as_csv(";", ""),
        as_csv("\t", "NaN"),
        as_csv(",", "nan").replace("*NOTE", '"*NOTE').replace("3*", '3*"'),
        as_csv(" ", "nan").replace("197", "197.0").replace("REFNUM BG", "REFNUM  BG"),
        "".join(
            f"{number - 1},{line}\n" if number else f",{line}\n" for number, line in enumerate(as_csv(",", "").splitlines())
        ),
    ],
    ids=["commas", "semicolons", "tabulators", "nan", "blanks and floats", "an index"],
)
def test_copies_of_the_table_say_the_same(mias, text):
    before = prepare(mias)
    (mias / "Info.txt").write_text(text)
    assert tell_dataset((mias / "Info.txt",))[0] == "mias"
    made = prepare(mias)
    assert made.manifest.equals(before.manifest)
    assert made.findings.equals(before.findings)
    assert len(made.problems) == len(before.problems) == 2


def test_a_torn_row_of_a_csv_is_named(mias):
    (mias / "Info.txt").write_text(as_csv(",", "").replace("510,290,70", "510,290,"))
    with pytest.raises(BadInput, match=r"Info.txt line 3: 'mdb002,G,CIRC,B,510,290,' is no row like"):
        prepare(mias)
