"""The classification guide's command lines, as they stand there but for the program's name, in a folder laid out as it says."""

from __future__ import annotations

import json
import shutil

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import yaml

from mammostream.dali_pipelines import LabelledLoader
from mammostream.models.checkpoints import load_checkpoint
from mammostream.shards import open_shards
from mammostream.train.run.charts import read_metrics

CLASSES = (
    "mass calcification architectural_distortion asymmetry normal benign malignant birads_2 birads_3 birads_4".split()  # noqa: SIM905
)
CONFIG = {
    "batch_size": 64,
    "epochs": 100,
    "lr_backbone": 5e-6,
    "lr_head": 2e-3,
    "freeze_backbone_epochs": 20,
    "label_smoothing": 0.2,
    "weight_decay": 1e-3,
}
BASE = """finetune \\
    --byol_checkpoint ./mammogram_byol_best.pth \\
    --train_csv ./train_labels.csv \\
    --val_csv ./val_labels.csv \\
    --tiles_dir ./tiles \\
"""
TRAIN = {
    "basic": f"""{BASE}    --class_names mass calcification architectural_distortion asymmetry normal benign malignant \
birads_2 birads_3 birads_4 \\
    --output_dir ./classification_results""",
    "custom configuration": f"""{BASE}    --class_names mass calcification normal \\
    --config ./classification_config.json \\
    --output_dir ./classification_results \\
    --wandb_project my-mammogram-classification""",
    "limited": f"""{BASE}    --class_names mass calcification normal \\
    --max_samples 1000 \\
    --output_dir ./test_results""",
    "complete example": f"""{BASE}    --class_names mass calcification architectural_distortion asymmetry normal \\
    --output_dir ./classification_results""",
}
INFER = {
    "single image": """infer \\
    --model_path ./classification_results/best_classification_model.pth \\
    --image_path ./test_image.png \\
    --threshold 0.5""",
    "batch": """infer \\
    --model_path ./classification_results/best_classification_model.pth \\
    --images_dir ./test_images \\
    --output_json ./predictions.json \\
    --batch_size 64""",
    "complete example": """infer \\
    --model_path ./classification_results/best_classification_model.pth \\
    --images_dir ./new_patient_tiles \\
    --output_json ./patient_predictions.json""",
}


def one_line(command: str) -> str:
    """Return the command as a shell passes it on, without the broken lines."""
    return command.replace("\\\n", "")


@pytest.fixture(scope="module")
def project(pretrained, tmp_path_factory):
    """The guide's folder: tiles as PNG files and their CSVs, from films with planted clusters; and the shards next to them."""
    root = tmp_path_factory.mktemp("your_project")
    shutil.copy(pretrained.pretrained / "mammogram_byol_best.pth", root)
    shards = open_shards(pretrained.shards)
    (root / "shards").symlink_to(pretrained.shards)
    (root / "tiles").mkdir()
    loader = LabelledLoader(shards.shards(), batch_size=32, tile_size=pretrained.tile_size, mean=0.0, std=1.0)
    keys = shards.tiles().set_index("tile")["key"]
    for batch, numbers in loader:
        for tile, number in zip(batch, numbers.tolist(), strict=True):
            pixels = np.rint(tile[0].numpy().astype(np.float64) * 65535).astype(np.uint16)
            (root / "tiles" / f"{keys[number]}.png").write_bytes(imagecodecs.png_encode(pixels))
    rng = np.random.default_rng(0)
    for split, path in (("train", pretrained.train_csv), ("val", pretrained.val_csv)):
        labels = pd.read_csv(path)
        table = pd.DataFrame({"tile_path": labels["tile_path"] + ".png"})
        for name in CLASSES:
            table[name] = rng.integers(0, 2, len(labels))
        table["mass"], table["calcification"] = labels["bright"], labels["simulated_calcification"]
        table.astype(dict.fromkeys(CLASSES, "Int8")).to_csv(root / f"{split}_labels.csv", index=False)
    (root / "classification_config.json").write_text(json.dumps(CONFIG))
    for folder in ("test_images", "new_patient_tiles"):
        (root / folder).mkdir()
    for path in sorted((root / "tiles").iterdir())[:3]:
        shutil.copy(path, root / "test_images")
        shutil.copy(path, root / "new_patient_tiles")
    shutil.copy(path, root / "test_image.png")
    yield root
    for path in root.rglob("*.pth"):
        path.unlink()


@pytest.mark.parametrize("source", ["tiles", "shards"])
@pytest.mark.parametrize("line", TRAIN)
def test_the_training_lines_run(project, mammostream, monkeypatch, line, source):
    """Shortened to one epoch of the guide's fifty, by one more option."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for folder in ("classification_results", "test_results"):
        shutil.rmtree(project / folder, ignore_errors=True)
    command = one_line(TRAIN[line])
    if source == "shards":
        command = command.replace("--tiles_dir ./tiles", "--shards ./shards")
    outcome = mammostream(f"{command} --epochs 1 --device cpu --num_workers 2")
    assert outcome.code == 0, outcome.err
    assert "🧊 Epoch 1: Backbone frozen (training only classification head)\nEpoch   1/1:\n  Train Loss: 0." in outcome.out
    assert "  ✅ New best model saved (AUC: " in outcome.out
    folder = project / ("test_results" if line == "limited" else "classification_results")
    best = load_checkpoint(folder / "best_classification_model.pth", "classifier")
    assert (folder / "final_classification_model.pth").is_file()
    wanted = command.partition("--class_names ")[2].partition(" --")[0].split()
    assert best["class_names"] == wanted
    assert set(best["metrics"]["per_class"]) == set(wanted)
    assert best["optimizer_state_dict"]["state"]
    # What the guide logs: losses, AUC and AP of each class, learning rates, the options.
    (logged,) = read_metrics(folder / "metrics.jsonl")
    assert {
        "train_loss",
        "val_loss",
        "mean_auc",
        "mean_ap",
        "lr_backbone",
        "lr_head",
        "per_class/mass/auc",
        "per_class/mass/ap",
    } <= (logged.keys())
    options = yaml.safe_load((folder / "config.yaml").read_text())
    defaults = {"batch_size": 32, "lr_backbone": 1e-5, "lr_head": 1e-3, "freeze_backbone_epochs": 10, "label_smoothing": 0.1}
    expected = CONFIG if line == "custom configuration" else defaults | {"gradient_clip": 1.0}
    assert {name: options[name] for name in expected | {"epochs": 1}} == expected | {"epochs": 1}
    if line == "custom configuration":
        assert options["wandb_project"] == "my-mammogram-classification"
    if line == "limited":
        assert options["max_samples"] == 1000


@pytest.mark.parametrize("line", INFER)
def test_the_inference_lines_run(project, mammostream, monkeypatch, line):
    monkeypatch.chdir(project)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    if not (project / "classification_results/best_classification_model.pth").is_file():
        assert mammostream(f"{one_line(TRAIN['complete example'])} --epochs 1 --device cpu").code == 0
    outcome = mammostream(f"{one_line(INFER[line])} --device cpu")
    assert outcome.code == 0, outcome.err
    assert "Top prediction: " in outcome.out
    if "--output_json" in INFER[line]:
        written = INFER[line].partition("--output_json ./")[2].split()[0]
        assert len(json.loads((project / written).read_text())["images"]) == 3
