"""Identity: strings from DICOM headers and paths are looked for in everything that is written, against docs/privacy.md."""

from __future__ import annotations

import fnmatch
import io
import tarfile
import warnings
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pydicom
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
# What each column of the table in docs/privacy.md stands for: strings that occur nowhere else.
SECRETS = {
    "patient": ["PID550011", "PID550022"],
    "study": ["1.2.826.0.1.990001.1", "1.2.826.0.1.990001.2"],
    "image": ["Hagedorn-Wilma-film1", "Hagedorn-Wilma-film2"],
    "paths": ["Ordner-Quittenbaum"],
    "header": [
        *("Zweifel", "Rosalinde", "19410317", "ACC778899", "Kantonsspital Quellwil", "Okonkwo", "Lindenweg 7", "0791234567"),
        *("OTHER5511", "Stationswagen", "SN-443322", "Bemerkung Nachbarin", "Operatrice Dupont", "Abteilung Senologie"),
    ],
}
HEADER = {
    "PatientName": "Zweifel^Rosalinde",
    "PatientBirthDate": "19410317",
    "AccessionNumber": "ACC778899",
    "InstitutionName": "Kantonsspital Quellwil",
    "InstitutionalDepartmentName": "Abteilung Senologie",
    "ReferringPhysicianName": "Okonkwo^Chidi",
    "OperatorsName": "Operatrice Dupont",
    "PatientAddress": "Lindenweg 7",
    "PatientTelephoneNumbers": "0791234567",
    "OtherPatientIDs": "OTHER5511",
    "StationName": "Stationswagen",
    "DeviceSerialNumber": "SN-443322",
    "PatientComments": "Bemerkung Nachbarin",
}


@pytest.fixture(scope="module")
def archive(finetuned, tmp_path_factory) -> Path:
    """The two real films as an archive might name them, and a third that cannot be read."""
    root = tmp_path_factory.mktemp("archive") / "Ordner-Quittenbaum"
    for number, source in enumerate(sorted(finetuned.films.glob("*.dcm")), start=1):
        path = root / str(number) / f"Hagedorn-Wilma-film{number}.dcm"
        path.parent.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            film = pydicom.dcmread(source)
            for name, value in HEADER.items():
                setattr(film, name, value)
            film.PatientID, film.StudyInstanceUID = SECRETS["patient"][number - 1], SECRETS["study"][number - 1]
            film.save_as(path)
    (root / "1" / "Hagedorn-Wilma-damaged.dcm").write_bytes(path.read_bytes()[:300])
    rows = [{"image_id": f"Hagedorn-Wilma-film{number}", "bright": number - 1} for number in (1, 2)]
    pd.DataFrame(rows).to_csv(root / "labels.csv", index=False)
    return root


def run_everything(run_cli, finetuned, archive: Path, out: Path, *options: str) -> None:
    run_cli(
        f"prepare --images-root {archive} --csv-path {archive}/labels.csv --output-dir {out}/prepare --assume-spacing 0.2 "
        f"--val-fraction 0.5 --workers 1 {' '.join(options)}"
    )
    manifest = f"--manifest {out}/prepare/manifest.parquet"
    run_cli(f"preview {manifest} --output-dir {out}/preview --workers 1")
    run_cli(f"shards build {manifest} --output-dir {out}/shards {finetuned.tiling} --workers 1")
    run_cli(f"shards labels {out}/shards {manifest} --image-labels bright --split train --output {out}/labels/train.csv")
    run_cli(
        f"infer --model-path {finetuned.finetuned}/final_classification_model.pth {manifest} --assume-spacing 0.2 "
        f"--device cpu --output-dir {out}/infer --sheet-tiles 2 --secondary-capture"
    )
    run_cli(f"report {out}/infer --output {out}/report/report.html")


def texts(name: str, data: bytes) -> list[str]:
    """Return all that a file says: its bytes as they are, and what lies in it compressed or encoded."""
    found = [data.decode("utf-8", "replace"), data.decode("utf-16-le", "replace")]
    if name.endswith(".parquet"):
        table = pq.read_table(io.BytesIO(data))
        found += [table.to_pandas().to_csv(), str(table.schema.to_string(show_field_metadata=True, truncate_metadata=False))]
    elif name.endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                found += [str(member.get_info()), *texts(member.name, tar.extractfile(member).read())]
    elif name.endswith((".png", ".jpg")):
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            found += [str(image.info), str(dict(image.getexif()))]
    elif name.endswith(".dcm"):
        found.append(str(pydicom.dcmread(io.BytesIO(data))))
    return found


def found_in(folder: Path) -> dict[str, set[str]]:
    """Return which kinds of secrets each file holds, in its name or its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            said = "\n".join([name, *texts(path.name, path.read_bytes())])
            found[name] = {kind for kind, secrets in SECRETS.items() if any(secret in said for secret in secrets)}
    return found


def documented() -> dict[str, set[str]]:
    """Return which kinds of secrets the files of each pattern may hold, by the table of docs/privacy.md."""
    lines = [
        line.strip("| ").split("|") for line in (ROOT / "docs/privacy.md").read_text().splitlines() if line.startswith("|")
    ]
    rows = [[cell.strip() for cell in line] for line in lines]
    columns = rows[0][1:]
    assert columns == list(SECRETS)
    rows = [row + [""] * (len(columns) + 1 - len(row)) for row in rows[2:] if "/" in row[0]]
    return {row[0].strip("`"): {kind for kind, cell in zip(columns, row[1:], strict=True) if cell == "yes"} for row in rows}


def test_every_file_holds_what_is_documented_and_no_more(archive, finetuned, run_cli, tmp_path):
    run_everything(run_cli, finetuned, archive, tmp_path)
    found, allowed = found_in(tmp_path), documented()
    seen: dict[str, set[str]] = {pattern: set() for pattern in allowed}
    for name, kinds in found.items():
        patterns = [pattern for pattern in allowed if fnmatch.fnmatch(name, pattern)]
        for pattern in patterns:
            seen[pattern] |= kinds
        assert kinds <= set().union(*(allowed[pattern] for pattern in patterns)), name
    # What is documented is there, or this test looks in the wrong places.
    for name in ("prepare/manifest.parquet", "*/config.yaml", "shards/*.tar", "shards/*.parquet", "infer/heatmap_*.dcm"):
        assert seen[name] == allowed[name], name
    assert "paths" in seen["prepare/problems.csv"]
    assert {Path(name).suffix for name, kinds in found.items() if "header" in kinds} == {".dcm"}


def test_with_pseudonyms_and_copies_only_the_commands_options_tell_where_the_films_were(archive, finetuned, run_cli, tmp_path):
    out = tmp_path / "out"
    run_cli(
        f"prepare --images-root {archive} --csv-path {archive}/labels.csv --output-dir {out}/prepare --assume-spacing 0.2 "
        f"--val-fraction 0.5 --workers 1 --copy --pseudonymise {tmp_path}/key"
    )
    manifest = f"--manifest {out}/prepare/manifest.parquet"
    run_cli(f"preview {manifest} --output-dir {out}/preview --workers 1")
    run_cli(f"shards build {manifest} --output-dir {out}/shards {finetuned.tiling} --workers 1")
    found = found_in(out)
    assert found.pop("prepare/config.yaml") == {"paths"}
    assert set().union(*found.values()) == set()
    assert found_in(tmp_path)["key.ids.csv"] == {"patient", "study", "image"}
