"""Checkpoint files: round trips, one-line errors, nothing executed, nothing half written."""

import os
import pickle
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mammostream.common.errors import BadInput
from mammostream.models.backbones import build_backbone
from mammostream.models.byol import MammogramBYOL
from mammostream.models.checkpoints import entries_of, load_byol, load_checkpoint, load_classifier, save_checkpoint
from mammostream.models.classifier import MammogramClassifier


@pytest.fixture(scope="module")
def byol() -> MammogramBYOL:
    torch.manual_seed(0)
    return MammogramBYOL(build_backbone("resnet18"), hidden_dim=24, proj_dim=12, num_classes=3).eval()


def byol_dict(model: MammogramBYOL) -> dict:
    return {
        "kind": "byol",
        "arch": model.backbone.arch,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9).state_dict(),
        "config": {"lr": 0.002, "betas": (0.9, 0.999), "note": None},
        "epoch": 3,
        "step": 120,
        "metrics": {"loss": -0.7},
        "preprocessing": {"tile_size": 512, "mean": 0.449, "std": 0.226},
    }


def classifier_dict(model: MammogramClassifier) -> dict:
    return {
        "kind": "classifier",
        "arch": "resnet18",
        "model_state_dict": model.state_dict(),
        "config": {"epochs": 5},
        "class_names": ["mass", "calcification"],
    }


@pytest.fixture
def byol_path(byol, tmp_path) -> Path:
    save_checkpoint(tmp_path / "mammogram_byol_best.pth", byol_dict(byol))
    return tmp_path / "mammogram_byol_best.pth"


@pytest.fixture
def classifier_path(byol, tmp_path) -> Path:
    path = tmp_path / "best_classification_model.pth"
    save_checkpoint(path, classifier_dict(MammogramClassifier.from_byol(byol, 2)))
    return path


def test_byol_round_trip(byol, byol_path):
    model = load_byol(byol_path, torch.device("cpu"))
    assert not model.training
    for name, tensor in byol.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    checkpoint = load_checkpoint(byol_path, "byol")
    assert (checkpoint["epoch"], checkpoint["step"]) == (3, 120)
    assert checkpoint["config"]["betas"] == (0.9, 0.999)
    assert checkpoint["preprocessing"]["tile_size"] == 512
    assert load_checkpoint(byol_path, None)["kind"] == "byol"
    assert list(byol_path.parent.iterdir()) == [byol_path]


def test_classifier_round_trip(byol, classifier_path):
    model, class_names, config = load_classifier(classifier_path, "cpu")
    assert (class_names, config) == (["mass", "calcification"], {"epochs": 5})
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.get_features(x), byol.get_features(x))
        assert model(x).shape == (2, 2)
        assert torch.equal(model(x), model.classify(x))


def test_the_other_kind_is_refused_with_a_hint(byol_path, classifier_path):
    with pytest.raises(BadInput, match=r"holds a classifier model, not a byol model; give a mammogram_byol_.*pretrain"):
        load_byol(classifier_path)
    with pytest.raises(BadInput, match=r"holds a byol model, not a classifier model; give a .*finetune"):
        load_classifier(byol_path)


def test_another_architecture_is_refused_with_a_hint(byol_path):
    assert load_byol(byol_path, arch="resnet18").backbone.arch == "resnet18"
    with pytest.raises(BadInput, match=r"best\.pth holds resnet18, not resnet50; pass --arch resnet18$"):
        load_byol(byol_path, arch="resnet50")


def test_files_that_are_not_checkpoints_give_a_one_line_error(byol_path, tmp_path):
    whole = byol_path.read_bytes()
    contents = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not a checkpoint\n" * 9,
        "noise": np.random.default_rng(0).bytes(4096),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "plain")
    for name in (*contents, "list", "plain", "missing", "."):
        with pytest.raises(BadInput) as caught:
            load_byol(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert "mammostream pretrain" in str(caught.value)


class Malicious:
    """Runs the given call when it is unpickled."""

    def __init__(self, call, *args) -> None:
        self.call = call, args

    def __reduce__(self):
        return self.call


CALLS = {
    "system": lambda path: (os.system, f"touch {path}"),
    "eval": lambda path: (eval, f"open({str(path)!r}, 'w')"),
    "method": lambda path: (Path.touch, path),
    "number": lambda path: (np.float64(0).__reduce__()[0], Malicious(os.system, f"touch {path}"), b""),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_pickle_that_runs_code_is_refused_and_not_run(call, tmp_path):
    code = Malicious(*CALLS[call](tmp_path / "ran"))
    entries = {
        "config": {"kind": "byol", "arch": "resnet18", "model_state_dict": {}, "config": code},
        "state": {"model_state_dict": {"conv1.weight": code}},
        "whole": code,
    }
    for name, entry in entries.items():
        torch.save(entry, tmp_path / f"{name}.zip.pth")
        (tmp_path / f"{name}.pickle.pth").write_bytes(pickle.dumps(entry, protocol=2))
        for form in ("zip", "pickle"):
            for load in (load_byol, load_classifier, lambda path: build_backbone("resnet18", path)):
                with pytest.raises(BadInput, match="never unpickled since it can run code") as caught:
                    load(tmp_path / f"{name}.{form}.pth")
                assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    # Each of them would have run code.
    if call != "number":
        pickle.loads((tmp_path / "whole.pickle.pth").read_bytes())
        assert (tmp_path / "ran").exists()


def test_a_refused_pickle_names_what_it_holds(tmp_path):
    torch.save({"config": Malicious(os.system, "true")}, tmp_path / "c.pth")
    with pytest.raises(BadInput, match=r"c\.pth holds '(posix|os)\.system', more than tensors"):
        load_checkpoint(tmp_path / "c.pth", None)


def test_the_first_tensor_that_does_not_fit_is_named(byol, tmp_path):
    path = tmp_path / "bad.pth"
    good = byol_dict(byol)

    def refused(changes: dict, message: str) -> None:
        state = {k: v for k, v in {**good["model_state_dict"], **changes}.items() if v is not None}
        save_checkpoint(path, {**good, "model_state_dict": state})
        with pytest.raises(BadInput, match=message) as caught:
            load_byol(path)
        assert "\n" not in str(caught.value)

    refused({"backbone.bn1.weight": None}, r"bad\.pth does not fit this model: it has no tensor 'backbone\.bn1\.weight'")
    refused({"backbone.bn1.weight": torch.ones(7)}, r"'backbone\.bn1\.weight' has the shape \(7,\), not \(64,\)")
    refused({"backbone.bn1.weight": "text"}, r"'backbone\.bn1\.weight' is a str, not a tensor")
    refused({"backbone.bn1.weight": torch.ones(64).to_sparse()}, r"'backbone\.bn1\.weight' is no dense tensor of real numbers")
    refused({"backbone.bn1.weight": torch.ones(64) * 1j}, r"'backbone\.bn1\.weight' is no dense tensor of real numbers")
    refused({"backbone.surplus": torch.ones(1)}, r"extra tensor 'backbone\.surplus'")
    refused({"projection_head.0.weight": None}, r"no matrix 'projection_head\.0\.weight'")


@pytest.mark.parametrize("seed", range(6))
def test_bytes_that_changed_are_refused(byol_path, seed):
    """torch does not look at the checksums in its files, and would load other weights."""
    with zipfile.ZipFile(byol_path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(byol_path.read_bytes())
    rng = np.random.default_rng(seed)
    data[largest.header_offset + 512 + rng.integers(largest.file_size - 512)] ^= 1 << rng.integers(8)
    byol_path.write_bytes(data)
    with pytest.raises(BadInput, match=f"checkpoint {byol_path} is damaged: its bytes changed"):
        load_byol(byol_path)


@pytest.mark.parametrize(
    ("name", "value"), [("metrics", 3), ("step", "x"), ("epoch", None), ("preprocessing", []), ("preprocessing.mean", "x")]
)
def test_entries_of_another_type_are_refused_by_name(byol, tmp_path, name, value):
    checkpoint = byol_dict(byol)
    outer, _, key = name.rpartition(".")
    holder = checkpoint if not outer else checkpoint[outer]
    checkpoint = checkpoint | ({outer: holder | {key: value}} if outer else {key: value})
    save_checkpoint(tmp_path / "c.pth", checkpoint)
    with pytest.raises(BadInput, match=f"c.pth is damaged: its '{name}' is "):
        load_checkpoint(tmp_path / "c.pth", "byol")


def test_what_an_entry_sets_off_is_one_line(tmp_path):
    for use in (lambda: {}["calibration"], lambda: float(None), lambda: None.items(), lambda: int("x"), lambda: [][3]):
        with (
            pytest.raises(BadInput, match=r"c\.pth has an entry that is missing or damaged") as caught,
            entries_of("c.pth", None),
        ):
            use()
        assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError), entries_of("c.pth", None):  # such as a GPU without memory
        raise RuntimeError("CUDA out of memory")


def test_class_names_must_match_the_outputs(byol, tmp_path):
    checkpoint = classifier_dict(MammogramClassifier.from_byol(byol, 4))
    save_checkpoint(tmp_path / "c.pth", checkpoint)
    with pytest.raises(BadInput, match="has 2 class names but 4 outputs"):
        load_classifier(tmp_path / "c.pth")


def test_only_what_can_be_read_back_is_written(byol, tmp_path):
    good, path = byol_dict(byol), tmp_path / "c.pth"
    with pytest.raises(TypeError, match=r"config\.lr is a float64"):
        save_checkpoint(path, {**good, "config": {"lr": np.float64(0.1)}})
    with pytest.raises(TypeError, match=r"metrics\.paths\[1\] is a PosixPath"):
        save_checkpoint(path, {**good, "metrics": {"paths": ["a", Path("b")]}})
    with pytest.raises(ValueError, match="has no 'arch'"):
        save_checkpoint(path, {k: v for k, v in good.items() if k != "arch"})
    with pytest.raises(ValueError, match="has no 'class_names'"):
        save_checkpoint(path, {**good, "kind": "classifier"})
    with pytest.raises(ValueError, match="does not say its kind"):
        save_checkpoint(path, {**good, "kind": "other"})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_older_checkpoint(byol, byol_path):
    before = byol_path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # writing past 1 MiB fails as on a full disk
    try:
        with pytest.raises(BadInput, match=r"cannot write checkpoint .*make room"):
            save_checkpoint(byol_path, byol_dict(byol))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert byol_path.read_bytes() == before
    assert list(byol_path.parent.iterdir()) == [byol_path]
