"""prepare --pseudonymise: keyed hashes for ids, the key and the map apart, the same key the same pseudonyms."""

from __future__ import annotations

import hashlib
import hmac
import stat

import numpy as np
import pandas as pd
import pytest

from mammostream.cli import cli
from mammostream.common.errors import BadInput
from mammostream.shards.manifest import read_findings, read_manifest
from mammostream.shards.prepare.pseudonyms import pseudonymised, read_key


def prepare(*arguments) -> None:
    cli.main(["prepare", *map(str, arguments)], prog_name="mammostream", standalone_mode=False)


@pytest.fixture
def archive(tmp_path, write_dicom):
    """Two patients with two films each, named by their files; a table with a label, and one box."""
    pixels = np.arange(2400, dtype=np.uint16).reshape(60, 40)
    for patient in ("Meier7", "Huber8"):
        for view in ("CC", "MLO"):
            path = tmp_path / "films" / patient / f"{patient}-{view}.dcm"
            write_dicom(
                path, pixels, PatientID=patient, StudyInstanceUID=f"1.2.{ord(patient[0])}", ViewPosition=view, Modality="MG"
            )
    (tmp_path / "films/Meier7/Meier7-torn.dcm").write_bytes(path.read_bytes()[:300])
    boxes = pd.DataFrame([["Huber8-CC", "mass", 1, 2, 30, 40]], columns=["image_id", "label", "xmin", "ymin", "xmax", "ymax"])
    boxes.to_csv(tmp_path / "boxes.csv", index=False)
    pd.DataFrame({"image_id": ["Meier7-CC", "Huber8-CC"], "cancer": [0, 1]}).to_csv(tmp_path / "labels.csv", index=False)
    return tmp_path


def options(archive, out) -> list:
    return [
        *("--images-root", archive / "films", "--csv-path", archive / "labels.csv", "--findings-csv", archive / "boxes.csv"),
        *("--output-dir", archive / out, "--workers", 1, "--val-fraction", 0.5),
    ]


def expected(key: bytes, kind: str, name: str) -> str:
    return kind[0].upper() + hmac.new(key, f"{kind}\0{name}".encode(), hashlib.sha256).hexdigest()[:16]


def test_ids_are_keyed_hashes_and_everything_else_is_as_without(archive, capfd):
    key_file = archive / "secret" / "key"
    prepare(*options(archive, "plain"))
    capfd.readouterr()
    prepare(*options(archive, "out"), "--copy", "--pseudonymise", key_file)
    said = capfd.readouterr().err
    key = key_file.read_bytes()
    assert len(key) == 32
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert f"made the key {key_file}" in said
    assert f"the map is {key_file}.ids.csv" in said

    plain, made = (read_manifest(archive / f"{name}/manifest.parquet") for name in ("plain", "out"))
    for kind in ("patient", "study", "image"):
        names = plain[f"{kind}_id"]
        assert made[f"{kind}_id"].tolist() == [expected(key, kind, name) for name in names]
    rest = [column for column in plain if not column.endswith("_id") and column not in ("path", "bits")]
    pd.testing.assert_frame_equal(plain[rest], made[rest])
    assert read_findings(archive / "out/findings.parquet")["image_id"].tolist() == [expected(key, "image", "Huber8-CC")]

    table = pd.read_csv(f"{key_file}.ids.csv")
    assert stat.S_IMODE((key_file.parent / "key.ids.csv").stat().st_mode) == 0o600
    assert dict(zip(table["pseudonym"], table["id"], strict=True))[expected(key, "patient", "Meier7")] == "Meier7"
    assert len(table) == 2 + 2 + 4
    assert "Meier7-torn" in (key_file.parent / "key.problems.csv").read_text()
    for path in (archive / "out").rglob("*"):
        assert not any(name in str(path.relative_to(archive)) for name in ("Meier", "Huber"))
        assert path.is_dir() or not any(name in path.read_bytes() for name in (b"Meier", b"Huber", b"1.2.77"))


def test_the_same_key_gives_the_same_pseudonyms_and_the_map_grows(archive, capfd):
    key_file = archive / "key"
    prepare(*options(archive, "first"), "--pseudonymise", key_file)
    (archive / "films/Huber8/Huber8-CC.dcm").unlink()
    (archive / "films/Huber8/Huber8-MLO.dcm").rename(archive / "films/Huber8/Neu-MLO.dcm")
    capfd.readouterr()
    (archive / "labels.csv").write_text("image_id,cancer\nMeier7-CC,0\n")
    prepare(*options(archive, "second")[:4], *options(archive, "second")[6:], "--pseudonymise", key_file)
    assert "made the key" not in capfd.readouterr().err
    first, second = (read_manifest(archive / f"{name}/manifest.parquet") for name in ("first", "second"))
    assert set(second["patient_id"]) == set(first["patient_id"])
    table = pd.read_csv(f"{key_file}.ids.csv")
    assert table["id"].tolist().count("Meier7") == 1
    assert {"Huber8-CC", "Huber8-MLO", "Neu-MLO"} <= set(table["id"])


def test_image_ids_of_known_data_sets_change_where_they_hold_a_patient_or_a_study():
    films = pd.DataFrame(
        {
            "image_id": ["Mass-Test_P_00016_LEFT_CC", "20586908", "1.2.3.4.5", "7"],
            "patient_id": ["P_00016", "e2", "AB99", "7"],
            "study_id": ["", "", "1.2.3.4", ""],
        }
    )
    made, findings, table = pseudonymised(films, None, b"k" * 32, every_image=False)
    assert findings is None
    assert (made["image_id"] != films["image_id"]).tolist() == [True, False, True, True]
    assert made["study_id"].tolist()[:2] == ["", ""]
    assert table["kind"].value_counts().to_dict() == {"patient": 4, "image": 3, "study": 1}


def test_bad_keys_and_maps_are_refused(archive, capfd):
    (archive / "short").write_bytes(b"abc")
    with pytest.raises(BadInput, match=r"short holds 3 bytes, too few for a key"):
        read_key(archive / "short")
    with pytest.raises(BadInput, match=r"cannot be read: Is a directory"):
        read_key(archive / "films")
    (archive / "key.ids.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match=r"key\.ids\.csv is there and holds no map of ids"):
        prepare(*options(archive, "out"), "--pseudonymise", archive / "key")
    assert not (archive / "out/manifest.parquet").exists()
    prepare(*options(archive, "out"), "--pseudonymise", archive / "out/key")
    assert "do not hand them on" in capfd.readouterr().err
