"""The README's steps, as they stand there, on a small film set laid out like each data set: from annotations to figures."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from mammostream.demo import run_command

ROOT = Path(__file__).parents[1]
README, DATA_SETS = (ROOT / "README.md").read_text(), (ROOT / "docs/data_sets.md").read_text()
HEIGHT, WIDTH, PATIENTS, RADIUS = 400, 300, 12, 12
# What makes the steps small enough for a test: appended to the README's own options, the last of which count.
SMALL = {
    "prepare": "--assume-spacing 0.4 --val-fraction 0.25",
    "shards build": "--pixel-spacing 0.4 --tile-size 64 --stride 64 --workers 1 --device cpu",
    "pretrain": "--arch resnet18_narrow --hidden-dim 32 --proj-dim 16 --epochs 1 --max-steps 2 --batch-size 8",
    "finetune": "--epochs 1 --freeze-backbone-epochs 1 --batch-size 16",
    "infer": "--batch-size 16 --sheet-tiles 0",
}
RUNTIME = "--device cpu --num-workers 2"
STEPS = ("prepare", "shards build", "pretrain", "shards labels", "finetune", "infer", "evaluate", "report")


def blocks(text: str) -> list[str]:
    return re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """The mammostream commands of a block, loops over splits written out."""
    text = block.replace("\\\n", " ")
    loop = re.compile(r"for split in (.*?); do\n(.*?)\ndone", re.DOTALL)

    def written_out(match: re.Match) -> str:
        return "\n".join(re.sub(r"\$\{?split\}?", split, match[2]) for split in match[1].split())

    lines = (line.split("  #")[0].strip() for line in loop.sub(written_out, text).splitlines())
    return [line.removeprefix("mammostream ") for line in lines if line.startswith("mammostream ")]


def steps_of_the_readme() -> list[str]:
    """The commands of the user guide's numbered steps that the data's way needs, in their order."""
    guide = README[README.index("## On your films") : README.index("## From Python")]
    lines = [line for block in blocks(guide) for line in commands(block)]
    wanted = [line for line in lines if line.startswith(STEPS) and "..." not in line and "--image-path" not in line]
    return [*wanted, "report work"]


def steps_of(data_set: str) -> list[str]:
    """The README's steps, with the data set's own lines of its page in their places."""
    section = DATA_SETS[DATA_SETS.index(f"\n## {data_set}\n") :].split("\n## ")[1]
    prepare, rest = (commands(block) for block in blocks(section))
    steps = steps_of_the_readme()
    others = [line for line in steps if not line.startswith(("prepare", "shards labels", "finetune"))]
    build = others.index(next(line for line in others if line.startswith("pretrain"))) + 1
    return [*prepare, *others[:build], *rest, *others[build:]]


def test_the_readmes_lines_are_those_of_the_vindr_page():
    assert steps_of_the_readme() == steps_of("VinDr-Mammo")


# --- small data sets, laid out as they are published ---


def film(number: int, side: str, lesion: tuple[int, int] | None) -> np.ndarray:
    """A breast of dense texture, with a bright lesion around (x, y): uint16."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.hypot((y - HEIGHT / 2) / (0.42 * HEIGHT), (x if side == "L" else WIDTH - 1 - x) / (0.75 * WIDTH))
    pixels = np.where(distance < 1, 1500 + 150 * rng.standard_normal((HEIGHT, WIDTH)), 0)
    if lesion:
        pixels += 1500 * (np.hypot(y - lesion[1], x - lesion[0]) < RADIUS)
    return np.clip(pixels, 0, 4095).astype(np.uint16)


def write_dicom(path: Path, pixels: np.ndarray, patient: str, spacing: float | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.1.2"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.PatientID, dataset.Modality, dataset.PhotometricInterpretation = patient, "MG", "MONOCHROME2"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = *pixels.shape, 1
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = pixels.tobytes()
    if spacing:
        dataset.PixelSpacing = [spacing, spacing]
    dataset.save_as(path, enforce_file_format=True)


def cases():
    """Each film's number, patient number, side, view and lesion: every second patient has one, seen in one view only if odd."""
    for number in range(PATIENTS * 4):
        patient, of_patient = divmod(number, 4)
        side, view = "LR"[of_patient // 2], ("CC", "MLO")[of_patient % 2]
        shown = patient % 2 == 0 and side == "L" and (view == "CC" or patient % 4 == 0)
        x = 70 if side == "L" else WIDTH - 70
        yield number, patient, side, view, (x, HEIGHT // 2) if shown else None


def box(lesion):
    return lesion[0] - RADIUS, lesion[1] - RADIUS, lesion[0] + RADIUS, lesion[1] + RADIUS


def make_vindr(folder: Path) -> None:
    breasts, findings = [], []
    for number, patient, side, view, lesion in cases():
        study, image = f"{patient:032x}", f"{number + 1000:032x}"
        write_dicom(folder / f"vindr/images/{study}/{image}.dicom", film(number, side, lesion), "", None)
        split = "test" if patient >= PATIENTS - 4 else "training"
        birads = "BI-RADS 4" if lesion else "BI-RADS 1"
        breasts.append((study, "s", image, side, view, HEIGHT, WIDTH, birads, "DENSITY B", split))
        category = ("Mass", "Suspicious Calcification")[patient // 2 % 2]
        findings.append((image, f"['{category}']" if lesion else "['No Finding']", *(box(lesion) if lesion else [None] * 4)))
    names = "study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density,split"
    pd.DataFrame(breasts, columns=names.split(",")).to_csv(folder / "vindr/breast-level_annotations.csv", index=False)
    names = "image_id,finding_categories,xmin,ymin,xmax,ymax"
    pd.DataFrame(findings, columns=names.split(",")).to_csv(folder / "vindr/finding_annotations.csv", index=False)


def make_cbis(folder: Path) -> None:
    rows: dict[str, list] = {f"{kind}_{split}": [] for kind in ("mass", "calc") for split in ("train", "test")}
    for number, patient, side, view, lesion in cases():
        test, kind = patient >= PATIENTS - 4, ("Mass", "Calc")[patient // 2 % 2]
        woman, long_side = f"P_{patient:05d}", {"L": "LEFT", "R": "RIGHT"}[side]
        case = f"{kind}-{'Test' if test else 'Training'}_{woman}_{long_side}_{view}"
        pixels = film(number, side, lesion)
        write_dicom(folder / f"cbis/images/{case}/{number}/f{number}/1-1.dcm", pixels, case, None)
        xmin, ymin, xmax, ymax = box(lesion or (100 if side == "L" else 200, 200))
        mask = np.zeros_like(pixels)
        mask[ymin:ymax, xmin:xmax] = 255
        write_dicom(folder / f"cbis/images/{case}_1/{number}/m{number}/1-2.dcm", mask, f"{case}_1", None)
        pathology = "MALIGNANT" if lesion else "BENIGN"
        detail = ("OVAL", "CIRCUMSCRIBED") if kind == "Mass" else ("PLEOMORPHIC", "CLUSTERED")
        rows[f"{kind.lower()}_{'test' if test else 'train'}"].append(
            (
                *(woman, 2, long_side, view, 1, {"Mass": "mass", "Calc": "calcification"}[kind], *detail, 4, pathology, 3),
                *(
                    f"{case}/{number}/f{number}/1-1.dcm",
                    f"{case}_1/{number}/m{number}/1-2.dcm",
                    f"{case}_1/{number}/m{number}/1-2.dcm",
                ),
            )
        )
    for name, its_rows in rows.items():
        kind, split = name.split("_")
        detail = "mass shape,mass margins" if kind == "mass" else "calc type,calc distribution"
        header = (
            f"patient_id,breast_density,left or right breast,image view,abnormality id,abnormality type,{detail},assessment,"
            "pathology,subtlety,image file path,cropped image file path,ROI mask file path"
        )
        path = folder / f"cbis/{kind}_case_description_{split}_set.csv"
        pd.DataFrame(its_rows, columns=header.split(",")).to_csv(path, index=False)


def make_rsna(folder: Path) -> None:
    rows = []
    for number, patient, side, view, _ in cases():
        shown = patient % 2 == 0 and side == "L"  # labels are of the breast
        lesion = (70, HEIGHT // 2) if shown else None
        write_dicom(folder / f"rsna/train_images/{10000 + patient}/{5000 + number}.dcm", film(number, side, lesion), "", 0.4)
        rows.append((1, 10000 + patient, 5000 + number, side, view, 60, int(shown), 0, 0, None, 0, "B", 21, False))
    names = (
        "site_id,patient_id,image_id,laterality,view,age,cancer,biopsy,invasive,BIRADS,implant,density,machine_id,"
        "difficult_negative_case"
    )
    pd.DataFrame(rows, columns=names.split(",")).to_csv(folder / "rsna/train.csv", index=False)


def make_mias(folder: Path) -> None:
    (folder / "mias").mkdir()
    lines = ["REFNUM BG CLASS SEVERITY X Y RADIUS"]
    for number in range(1, 2 * PATIENTS + 1):  # even films are left breasts
        patient, side = (number - 1) // 2, "LR"[number % 2]
        shown = patient % 2 == 0 and side == "L"
        small = film(number, side, (70, 200) if shown else None) // 16
        pixels = np.kron(small, np.ones((2, 2), np.uint8)).astype(np.uint8)
        whole = np.zeros((1024, 1024), np.uint8)
        left = 0 if side == "L" else 1024 - pixels.shape[1]
        whole[100 : 100 + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        (folder / f"mias/mdb{number:03d}.pgm").write_bytes(b"P5\n1024 1024\n255\n" + whole.tobytes())
        kind = ("CIRC", "CALC")[patient // 2 % 2]
        lines.append(f"mdb{number:03d} G {kind} M 140 {1024 - 500} {2 * RADIUS}" if shown else f"mdb{number:03d} G NORM")
    (folder / "mias/Info.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("data_set", "make"),
    [("VinDr-Mammo", make_vindr), ("CBIS-DDSM", make_cbis), ("RSNA", make_rsna), ("mini-MIAS", make_mias)],
)
def test_the_readmes_steps_lead_to_figures_on_held_out_patients(data_set, make, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    make(tmp_path)
    for line in steps_of(data_set):
        name = next(step for step in STEPS if line.startswith(step))
        line = line.replace("--test-fraction 0.2", "--test-fraction 0.4")  # of 12 patients
        small = SMALL.get(name, "") + (f" {RUNTIME}" if name in ("pretrain", "finetune", "infer") else "")
        capsys.readouterr()
        run_command(shlex.split(f"{line} {small}"))
        if name == "evaluate":
            said = capsys.readouterr().out
            assert "the model was" not in said, said  # trained on nobody of the test split, chosen on nobody
    splits = pd.read_parquet("work/manifest.parquet").groupby("split")["patient_id"].nunique()
    assert set(splits.index) == {"train", "val", "test"}
    for level in ("tile", "breast"):
        metrics = json.loads(Path(f"work/evaluate/{level}s/metrics.json").read_text())
        assert metrics["level"] == level
        assert metrics["seen"]["trained"] == metrics["seen"]["validated"] == {"rows": 0, "patients": 0}
        judged = [figures for figures in metrics["per_class"].values() if figures["positives"] and figures["negatives"]]
        assert judged
        assert all(figures["auc"] is not None for figures in judged)
        assert all(figures["left_out"] == {"positives": {}, "negatives": {}} for figures in judged)
        assert metrics["patients"] == splits["test"]
    assert Path("work/report.html").is_file()
