"""prepare: telling data sets apart, damaged files, unreadable folders, copies that survive kills, 20,000 films."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mammostream.common.errors import BadInput
from mammostream.preprocess.reading import read_mammogram
from mammostream.shards.annotations.datasets import tell_dataset
from mammostream.shards.annotations.tree import ImageTree
from mammostream.shards.manifest import read_findings, read_manifest, write_manifest
from mammostream.shards.prepare.films import _with_test, _with_validation, prepare_films
from mammostream.shards.prepare.layout import copy_films

NOBODY = 65534
MAMMOSTREAM = [sys.executable, "-m", "mammostream"]


# --- which data set ---------------------------------------------------------------------------------------------------------

VINDR = "study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density,split\n"
RSNA = (
    "site_id,patient_id,image_id,laterality,view,age,cancer,biopsy,invasive,BIRADS,implant,density,machine_id,"
    "difficult_negative_case\n"
)
CBIS = (
    "patient_id,breast density,left or right breast,image view,abnormality id,abnormality type,calc type,calc distribution,"
    "assessment,pathology,subtlety,image file path,cropped image file path,ROI mask file path\n"
)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (VINDR, "vindr"),
        (RSNA, "rsna"),
        (CBIS, "cbis-ddsm"),
        (CBIS.replace("breast density", "breast_density").replace("calc", "mass"), "cbis-ddsm"),
        ("prose\nmdb001 G CIRC B 535 425 197\n", "mias"),
        ("image_id,mass\n", "folder"),
        # Columns that other data sets have as well make no data set.
        ("image_id,study_id,patient_id,laterality,view,split,cancer,biopsy\n", "folder"),
        ("\ufeff" + VINDR.replace("\n", "\r\n"), "vindr"),
        (VINDR.upper().replace(",", ";"), "vindr"),
        ("site_id,patient_id,image_id,laterality,view,age,implant,machine_id,prediction_id\n", "rsna"),
        ("file_path,image_path,PatientID,SeriesDescription,Rows\n", "cbis-ddsm"),
        ("Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads\n", "inbreast"),
        (",empi_anon,acc_anon,anon_dicom_path,FinalImageType,ImageLateralityFinal,ViewPosition,num_roi\n", "embed"),
        ("empi_anon,acc_anon,numfind,side,asses,tissueden,massshape,calcfind,path_severity,bside\n", "embed"),
        ("ID1,LeftRight,Age,number,abnormality,classification,subtype\n", "cmmd"),
        ('"Percentage of\n grandular tissue(density)",PatientID,Breast  type,Breast view,Assesment,Image path\n', "kau-bcmd"),
        ("Path\tmass\n", "folder"),
    ],
)
def test_data_sets_are_told_by_their_columns(tmp_path, content, name):
    path = tmp_path / "a.csv"
    path.write_text(content, newline="")
    told, reason = tell_dataset((path,))
    assert told == name
    assert str(path) in reason


def test_no_csv_is_a_folder():
    assert tell_dataset(()) == ("folder", "no --csv-path is given")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (VINDR.replace("breast_birads", "birads_of_breast"), "looks like vindr's but has no column 'breast_birads'"),
        (RSNA.replace("cancer", "cancr"), r"looks like rsna's but has no column 'cancer' \(did you mean 'cancr'\?\)"),
        (CBIS.replace("pathology", "patholgy"), "looks like cbis-ddsm's but has no column 'pathology'"),
        ("imageid,mass\n", r"no column 'image_id' \(did you mean 'imageid'\?\), and its columns are those of no data set"),
        ("", "is empty"),
    ],
)
def test_a_csv_of_no_data_set_is_refused(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(BadInput, match=message) as caught:
        tell_dataset((tmp_path / "a.csv",))
    assert str(tmp_path / "a.csv") in str(caught.value)


def test_files_of_several_data_sets_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text(VINDR)
    (tmp_path / "b.csv").write_text(RSNA)
    with pytest.raises(BadInput, match=r"several data sets \(.*a.csv is of vindr, .*b.csv is of rsna\)"):
        tell_dataset((tmp_path / "a.csv", tmp_path / "b.csv"))


# --- damaged files ----------------------------------------------------------------------------------------------------------


def noise(shape=(60, 40), dtype=np.uint16):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)


@pytest.fixture
def root(tmp_path):
    """Four films of two patients."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("P1_a", "P1_b", "P2_a", "P2_b"):
        Image.fromarray(noise()).save(folder / f"{name}.png")
    return folder


def prepare(root, **options):
    return prepare_films("folder", root, patient_regex=r"P\d", **options)


def cut_png(path, write_dicom):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def cut_png_within_the_last_chunk(path, write_dicom):
    path.write_bytes(path.read_bytes()[:-30])


def empty(path, write_dicom):
    path.write_bytes(b"")


def dicom_without_pixels(path, write_dicom):
    path.unlink()
    write_dicom(path.with_suffix(".dcm"), None)


def dicom_without_an_image(path, write_dicom):
    path.unlink()
    write_dicom(path.with_suffix(".dcm"), None, Rows=None)


def png_called_dicom(path, write_dicom):
    path.rename(path.with_suffix(".dcm"))


def text_called_png(path, write_dicom):
    path.write_text("image_id,mass\n")


def cut_tiff(path, write_dicom):
    path.unlink()
    path.with_suffix(".tif").write_bytes(b"II*\0\x08")


def broken_link(path, write_dicom):
    path.unlink()
    path.symlink_to("nowhere.png")


DAMAGES = [
    *[cut_png, cut_png_within_the_last_chunk, empty, dicom_without_pixels, dicom_without_an_image, png_called_dicom],
    *[text_called_png, cut_tiff, broken_link],
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_files_are_listed_and_the_rest_goes_on(root, write_dicom, damage):
    damage(root / "P2_a.png", write_dicom)
    made = prepare(root)
    ((kind, message),) = [(p.kind, p.message) for p in made.problems]
    assert kind == "unreadable"
    assert message.startswith(f"image {root / 'P2_a'}.")
    assert "\n" not in message
    assert made.manifest.set_index("image_id")["bits"].to_dict() == {"P1_a": 16, "P1_b": 16, "P2_a": 0, "P2_b": 16}


def test_a_torn_dicom_keeps_what_its_header_says(root, write_dicom):
    said = {"PatientID": "P3", "StudyInstanceUID": "1.2", "ImageLaterality": "R", "PixelSpacing": [0.07, 0.07]}
    write_dicom(root / "P3_a.dcm", None, **said)
    row = prepare(root).manifest.set_index("image_id").loc["P3_a"]
    assert row[["patient_id", "study_id", "laterality", "pixel_spacing_mm", "bits"]].tolist() == ["P3", "1.2", "R", 0.07, 0]


def test_whole_files_of_every_kind_are_not_suspected(root, write_dicom, films):
    write_dicom(root / "P3_a.dcm", noise())
    write_dicom(root / "P3_b.dcm", noise(), rle=True)
    write_dicom(root / "P3_c.png", noise())  # DICOM whatever it is called
    shutil.copy(films[0].path, root / "P3_d.dcm")
    tifffile.imwrite(root / "P4_a.tif", noise())
    Image.fromarray(noise(dtype=np.uint8)).save(root / "P4_b.pgm")
    with (root / "P1_a.png").open("ab") as file:
        file.write(b"more than the image, as some programs append")
    made = prepare_films("folder", root, patient_regex=r"P_?\d+")
    assert made.problems == []
    assert (made.manifest["bits"] > 0).all()
    assert len(made.manifest) == 10


def test_files_that_are_no_images_are_counted(root):
    for name in ("a.gif", "b.GIF", "c.txt"):
        (root / name).write_bytes(b"x")
    (note,) = prepare(root).notes
    assert note.startswith(f"3 files below {root} are left out")
    assert note.endswith("2 .gif, 1 .txt")


@contextmanager
def unprivileged():
    """Drop root's power over permissions, which would let every read and write through."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that any user may enter: those of pytest are the owner's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_an_unreadable_folder_and_file_are_listed(open_folder, root):
    images = Path(shutil.copytree(root, open_folder / "images"))
    (images / "locked").mkdir()
    (images / "P1_b.png").rename(images / "locked" / "P1_b.png")
    whole = prepare(images)  # imports everything while it may
    assert len(whole.manifest) == 4
    (images / "locked").chmod(0)
    (images / "P2_b.png").chmod(0)
    with unprivileged():
        made = prepare(images)
    assert [p.kind for p in made.problems] == ["unreadable", "unreadable"]
    assert made.problems[0].message == f"folder {images}/locked cannot be read: Permission denied; check its permissions"
    assert "P2_b.png cannot be read" in made.problems[1].message
    assert made.manifest["image_id"].tolist() == ["P1_a", "P2_a", "P2_b"]
    images.chmod(0)
    with unprivileged(), pytest.raises(BadInput, match="images folder .* cannot be read: Permission denied"):
        prepare(images)
    images.chmod(0o755)


def corners(size):
    return st.tuples(*[st.floats(-50, size + 50)] * 2).map(sorted)


@given(st.lists(st.tuples(corners(40), corners(60)), min_size=1, max_size=8))
def test_boxes_always_lie_in_their_film(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("boxes")
    Image.fromarray(noise()).save(folder / "P1.png")
    lines = [f"P1,mass,{x[0]!r},{y[0]!r},{x[1]!r},{y[1]!r}\n" for x, y in drawn]
    (folder / "boxes.csv").write_text("image_id,label,xmin,ymin,xmax,ymax\n" + "".join(lines))
    made = prepare(folder, findings_csv=folder / "boxes.csv")
    got = made.findings[["xmin", "ymin", "xmax", "ymax"]].to_numpy(float)
    cut = [(max(x[0], 0), max(y[0], 0), min(x[1], 40), min(y[1], 60)) for x, y in drawn]
    expected = [box for box in cut if box[0] < box[2] and box[1] < box[3]]
    assert got.tolist() == [list(box) for box in expected]
    assert len(got) + len(made.problems) == len(drawn)


def test_linked_folders_are_not_entered_but_named(root, tmp_path):
    (tmp_path / "more").mkdir()
    (root / "P2_b.png").rename(tmp_path / "more" / "P2_b.png")
    (root / "more").symlink_to(tmp_path / "more")
    made = prepare(root)
    assert [(p.kind, p.message) for p in made.problems] == [
        (
            "not searched",
            f"folder {root}/more is a link; give --follow-links to search it, or the folder itself as --images-root",
        )
    ]
    assert len(made.manifest) == 3


def test_a_tree_finds_by_tails_and_folders(tmp_path):
    paths = tuple(tmp_path / name for name in ("a/b/c.png", "a/d/e.png", "f/b/e.dcm", "g.1.2"))
    tree = ImageTree(tmp_path, paths)
    assert tree.find(("c",), "here") == tree.find(("b/c",), "here") == tree.find(("a/b/c",), "here") == paths[0]
    assert tree.find(("nothing", "b/e", "c"), "here") == paths[2]
    assert tree.find(("g.1.2",), "here") == paths[3]
    assert tree.find(("b/c/d",), "here") is None
    assert tree.within("b", "here") == [paths[0], paths[2]]
    assert tree.within("a", "here") == [paths[0], paths[1]]
    assert tree.within("c", "here") == []
    with pytest.raises(BadInput, match="here: 'e' fits 2 files"):
        tree.find(("e",), "here")
    for name in ("../x", "/x", "a/../../x", ".."):
        with pytest.raises(BadInput, match="here: the path .* leads outside --images-root"):
            tree.find((name,), "here")


# --- copies -----------------------------------------------------------------------------------------------------------------


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".tmp"
    }


@pytest.fixture
def studies(tmp_path, write_dicom):
    """Films of several kinds in the layout of VinDr-Mammo, without its CSV."""
    folder = tmp_path / "images"
    spacing = {"PixelSpacing": [0.07, 0.07], "PatientID": "P1", "StudyInstanceUID": "1.2"}
    write_dicom(folder / "s1/twelve.dicom", noise() >> 4, rle=True, BitsStored=12, HighBit=11, **spacing)
    write_dicom(folder / "s1/inverted.dicom", noise(), PhotometricInterpretation="MONOCHROME1", **spacing)
    write_dicom(folder / "s2/eight.dicom", noise(dtype=np.uint8), **(spacing | {"PatientID": "P2", "StudyInstanceUID": ""}))
    return folder


def test_copies_hold_what_is_read_and_keep_the_spacing(studies, tmp_path):
    made = prepare_films("folder", studies, val_fraction=0.5)
    films, problems, notes = copy_films(made.manifest, tmp_path / "out", workers=1)
    assert (problems, notes) == ([], [])
    names = {"twelve": "1.2_twelve.png", "inverted": "1.2_inverted.png", "eight": "eight.png"}
    for before, after in zip(made.manifest.itertuples(), films.itertuples(), strict=True):
        assert Path(after.path) == tmp_path / "out" / after.split / names[after.image_id]
        with Image.open(after.path) as image:
            assert image.mode == ("L" if after.image_id == "eight" else "I;16")
            pixels = np.asarray(image)
        np.testing.assert_array_equal(pixels, read_mammogram(before.path).pixels)
        assert after.bits == 8 * pixels.dtype.itemsize
    inverted = films.set_index("image_id").loc["inverted", "path"]
    np.testing.assert_array_equal(read_mammogram(inverted).pixels, noise().max() - noise())
    assert films["pixel_spacing_mm"].tolist() == [0.07] * 3
    assert set(films["spacing_source"]) == {"dicom:PixelSpacing"}
    write_manifest(films, tmp_path / "out" / "manifest.parquet")
    assert pd.read_parquet(tmp_path / "out/manifest.parquet")["path"].str.match(r"(train|val)/\S+\.png$").all()


def test_copies_that_are_there_stay_and_others_are_named(root, tmp_path):
    films = prepare(root, val_fraction=0.5, seed=0).manifest
    copy_films(films, tmp_path / "out", workers=1)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").rglob("*.png")}
    assert len(before) == 4
    # The patients change places: their copies move along, none is made again, none stays in both splits.
    turned = films.assign(split=films["split"].map({"train": "val", "val": "train"}))
    (tmp_path / "out/train/stranger.png").write_bytes(b"x")
    moved, problems, notes = copy_films(turned, tmp_path / "out", workers=1)
    assert problems == []
    assert notes == [
        f"1 images next to the copies are not of this manifest, such as {tmp_path}/out/train/stranger.png; remove them"
    ]
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").rglob("P*.png")}
    assert after == before
    assert all(Path(row.path).parent.name == row.split for row in moved.itertuples())


def test_films_that_cannot_be_copied_are_listed(root, tmp_path):
    Image.fromarray(np.stack([noise(dtype=np.uint8)] * 2 + [noise(dtype=np.uint8).T.reshape(60, 40)], -1)).save(
        root / "P3_a.png"
    )
    (root / "P3_b.png").write_bytes(b"")
    made = prepare(root)
    films, problems, _ = copy_films(made.manifest, tmp_path / "out", workers=1)
    assert [(p.kind, p.message) for p in problems] == [
        ("not copied", f"image {root}/P3_a.png is in colour; convert it to grey")
    ]
    assert len(films) == 6
    paths = films.set_index("image_id")["path"]
    assert paths["P3_a"] == str(root / "P3_a.png")  # the build says why it gave nothing
    assert paths["P1_a"] == str(tmp_path / "out" / films.set_index("image_id").loc["P1_a", "split"] / "P1_a.png")
    assert len(list((tmp_path / "out").rglob("*.png"))) == 4


def test_two_films_of_one_name_are_refused(root, tmp_path):
    films = prepare(root).manifest
    films.loc[[0, 1], "study_id"], films.loc[[0, 1], "image_id"] = ["a", "a_b"], ["b_c", "c"]
    with pytest.raises(BadInput, match=r"two films would be copied to the name a_b_c\.png"):
        copy_films(films, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def large_films(tmp_path):
    """24 films that take a moment to copy."""
    folder = tmp_path / "large"
    folder.mkdir()
    for number in range(24):
        tifffile.imwrite(folder / f"P{number // 4}_{number}.tif", np.roll(noise((700, 500)), number))
    return folder


def copy_command(images, output, *more):
    return [
        *[*MAMMOSTREAM, "prepare", "--images-root", images, "--output-dir", output, "--patient-regex", r"P\d", "--copy"],
        *["--assume-spacing", "0.1", *more],
    ]


def test_killed_copying_goes_on_to_the_same_bytes(large_films, tmp_path):
    subprocess.run(copy_command(large_films, tmp_path / "whole"), capture_output=True, check=True)
    output = tmp_path / "killed"
    rng = np.random.default_rng(0)
    kills = 0
    for workers in ("1", "2", "1"):
        process = subprocess.Popen(
            copy_command(large_films, output, "--workers", workers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        have = len(list(output.glob("*/*.png")))
        deadline = time.monotonic() + 60
        while len(list(output.glob("*/*.png"))) < min(have + rng.integers(1, 6), 23) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (output / "manifest.parquet").exists() or process.returncode == 0
    assert kills
    subprocess.run(copy_command(large_films, output), capture_output=True, check=True)
    whole, got = contents(tmp_path / "whole"), contents(output)
    whole.pop("config.yaml"), got.pop("config.yaml")  # names its folder
    assert got == whole
    assert len(whole) == 24 + 2


def test_no_room_ends_the_copying_with_one_line_and_no_torn_file(large_films, tmp_path):
    def small_files():
        # As a full disk: writing fails halfway.
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    command = copy_command(large_films, tmp_path / "out", "--workers", "1")
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot write")
    assert "File too large" in done.stderr
    assert list((tmp_path / "out").glob("**/*.*")) == []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "24 images of 6 patients" in done.stdout


def test_output_that_cannot_be_written_is_refused(root, open_folder):
    images = Path(shutil.copytree(root, open_folder / "images"))
    films = prepare(images).manifest
    output = open_folder / "out"
    for split in ("train", "val", "test"):
        (output / split).mkdir(parents=True)
    with unprivileged(), pytest.raises(BadInput, match=r"cannot write .*\.png: Permission denied"):
        copy_films(films, output, workers=1)
    with unprivileged(), pytest.raises(BadInput, match="cannot make the folder .*: Permission denied"):
        copy_films(films, open_folder / "new", workers=1)
    assert [path for path in output.rglob("*") if path.is_file()] == []


# --- the command ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def vindr(tmp_path):
    """40 films in VinDr-Mammo's form, of which 12 are missing and one is cut."""
    rows, findings = [VINDR], [VINDR.replace("split", "finding_categories,finding_birads,xmin,ymin,xmax,ymax,split")]
    for number in range(40):
        study, image, split = f"s{number // 4}", f"i{number}", "training" if number < 32 else "test"
        path = tmp_path / f"images/{study}/{image}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row = f"{study},x,{image},{'LR'[number % 2]},CC,60,40,BI-RADS {1 + number % 5},DENSITY B"
        rows.append(f"{row},{split}\n")
        findings.append(
            f"{row},['Mass'],BI-RADS 4,-1,2,30,40,{split}\n" if number % 5 == 3 else f"{row},['No Finding'],,,,,,{split}\n"
        )
        if number >= 12:
            Image.fromarray(noise()).save(path)
    path.write_bytes(path.read_bytes()[:200])
    (tmp_path / "breast-level_annotations.csv").write_text("".join(rows))
    (tmp_path / "finding_annotations.csv").write_text("".join(findings))
    return tmp_path


def run(*arguments, code=0):
    done = subprocess.run([*MAMMOSTREAM, "prepare", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_the_command_says_what_it_chose_and_what_it_left_out(vindr):
    out = vindr / "out"
    csvs = ["--csv-path", vindr / "breast-level_annotations.csv", "--findings-csv", vindr / "finding_annotations.csv"]
    done = run("--images-root", vindr, "--output-dir", out, *csvs, "--val-fraction", "0.2", "--copy")
    assert done.stdout.startswith(f"data set: vindr ({vindr}/breast-level_annotations.csv has its columns)\n")
    assert done.stdout.rstrip().endswith(f"28 images of 7 patients, 12 missing, 1 unreadable -> {out}/manifest.parquet")
    errors = done.stderr.splitlines()
    missing = [line for line in errors if line.startswith("missing: ")]
    assert len(missing) == 11  # ten, and one that counts the others
    assert missing[0].endswith(f"line 2: no file for the image 'i0' below {vindr}")
    assert missing[-1] == f"missing: and 2 more, see {out}/problems.csv"
    assert any(line.startswith("unreadable: image ") and "i39.png cannot be read" in line for line in errors)
    assert any(line.startswith("note: ") and "boxes reach out of their film" in line for line in errors)
    assert "28 images have no pixel spacing" in done.stderr
    problems = pd.read_csv(out / "problems.csv")
    assert problems["kind"].value_counts().to_dict() == {"missing": 12, "unreadable": 1}

    films, findings = read_manifest(out / "manifest.parquet"), read_findings(out / "findings.parquet")
    assert films["split"].value_counts().to_dict() == {"train": 16, "test": 8, "val": 4}
    assert set(findings["image_id"]) == {f"i{n}" for n in range(13, 40, 5)}
    assert (findings[["xmin", "ymin", "xmax", "ymax"]].to_numpy() == [0, 2, 30, 40]).all()
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "images 16 4 8" in lines
    assert "view train val test" in lines
    assert "(unknown) 16 4 8" in lines  # spacing
    # The labels as 'positive of known', and the boxes.
    by_split = {split: films[films["split"] == split] for split in ("train", "val", "test")}
    for label in ("birads_4", "mass"):
        columns = [part[f"label:{label}"] for part in by_split.values()]
        assert f"{label} {' '.join(f'{int(c.sum())} of {c.count()}' for c in columns)}" in lines
    assert by_split["train"]["label:mass"].isna().any()  # BI-RADS 2
    counts = [findings["image_id"].isin(part["image_id"]).sum() for part in by_split.values()]
    assert f"mass {' '.join(map(str, counts))}" in lines
    copies = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    assert len(copies) == 27
    assert "test/s8_i32.png" in copies
    readable = films[films["bits"] > 0]
    assert sorted(os.path.relpath(path, out) for path in readable["path"]) == copies

    # Once more: the output, which lies within the images, is not treated as them.
    before = contents(out)
    again = run("--images-root", vindr, "--output-dir", out, *csvs, "--val-fraction", "0.2", "--copy")
    assert again.stdout == done.stdout
    assert contents(out) == before


def test_copies_within_the_images_are_not_taken_for_images(root):
    for _ in range(2):
        done = run("--images-root", root, "--output-dir", root / "out", "--patient-regex", r"P\d", "--copy")
        assert "4 images of 2 patients ->" in done.stdout


def test_bad_commands_end_with_one_line(vindr):
    out = vindr / "out"
    good = ["--images-root", vindr / "images", "--output-dir", out]
    (vindr / "empty.csv").write_text("image_id\n")
    for more, message in [
        (["--dataset", "vindr"], "--dataset vindr needs --csv-path: breast-level_annotations.csv"),
        (["--dataset", "rsna", "--csv-path", vindr / "breast-level_annotations.csv"], "has no column 'patient_id'"),
        (["--csv-path", vindr / "empty.csv"], "empty.csv has no rows"),
        (["--csv-path", vindr / "nowhere.csv"], "nowhere.csv does not exist"),
        (["--findings-csv", vindr / "nowhere.csv", "--patient-regex", "s\\d"], "nowhere.csv does not exist"),
        (["--csv-path", vindr / "finding_annotations.csv"], "give it as --findings-csv"),
    ]:
        done = run(*good, *more, code=2)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
    done = run("--images-root", vindr / "images", "--output-dir", vindr / "images", "--copy", code=2)
    assert "choose another --output-dir" in done.stderr
    assert not out.exists()


# --- 20,000 films -----------------------------------------------------------------------------------------------------------


def test_20000_films_take_seconds(tmp_path):
    """A data set of VinDr-Mammo's size, whole: CSVs, files (links to one), headers, boxes, splits, tables."""
    count = 20_000
    Image.fromarray(noise()).save(tmp_path / "film.png")
    rows, findings = [VINDR], [VINDR.replace("split", "finding_categories,finding_birads,xmin,ymin,xmax,ymax,split")]
    for number in range(count):
        study, image, split = f"{number // 4:032x}", f"{number + count:032x}", "training" if number < 0.8 * count else "test"
        if number % 4 == 0:
            (tmp_path / "images" / study).mkdir(parents=True)
        os.link(tmp_path / "film.png", tmp_path / "images" / study / f"{image}.png")
        row = f"{study},x,{image},{'LR'[number % 2]},CC,60,40,BI-RADS {1 + number % 5},DENSITY B"
        rows.append(f"{row},{split}\n")
        findings.append(
            f"{row},['Mass'],BI-RADS 4,-1,2,30,40,{split}\n" if number % 9 == 3 else f"{row},['No Finding'],,,,,,{split}\n"
        )
    (tmp_path / "breast.csv").write_text("".join(rows))
    (tmp_path / "findings.csv").write_text("".join(findings))
    start = time.process_time()
    made = prepare_films("vindr", tmp_path / "images", (tmp_path / "breast.csv",), tmp_path / "findings.csv")
    write_manifest(made.manifest, tmp_path / "manifest.parquet")
    frame = read_manifest(tmp_path / "manifest.parquet")
    seconds = time.process_time() - start
    assert len(frame) == count
    assert made.problems == []
    assert len(made.findings) == len(range(3, count, 9))
    # About 2 s of work; a check that is a loop over pairs of rows, or one scan a row, takes minutes.
    assert seconds < 15


# --- held-out patients ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 100), st.floats(0, 0.9), st.floats(0, 0.9))
def test_patients_are_dealt_to_three_splits_by_patient(seed, val_fraction, test_fraction):
    patients = [f"P{n // 2}" for n in range(40)]
    films = pd.DataFrame({"patient_id": patients, "split": ""})
    notes: list[str] = []
    films["split"] = _with_test(films, test_fraction, seed, notes)
    films["split"] = _with_validation(films, val_fraction, seed)
    counts = films.groupby("split")["patient_id"].nunique()
    assert films.groupby("patient_id")["split"].nunique().eq(1).all()
    assert counts["train"] >= 1
    assert abs(counts.get("test", 0) - 20 * test_fraction) <= 1
    assert abs(counts.get("val", 0) - (20 - counts.get("test", 0)) * val_fraction) <= 1
    if not test_fraction:  # as without the option
        assert films["split"].equals(_with_validation(films.assign(split=""), val_fraction, seed))


def test_an_official_test_split_is_kept():
    films = pd.DataFrame({"patient_id": ["a", "b", "c"], "split": ["train", "train", "test"]})
    notes: list[str] = []
    assert _with_test(films, 0.5, 0, notes).tolist() == ["train", "train", "test"]
    assert notes == ["the data set has a test split of its own: --test-fraction is not used"]
