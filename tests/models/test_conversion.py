"""Checkpoints of other programs: every form of state dict gives the same network, and tensors that do not fit are reported."""

import re

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from mammostream.common.errors import BadInput
from mammostream.common.normalisation import MEAN, STD
from mammostream.models.architectures import ARCHITECTURES
from mammostream.models.backbones import build_backbone
from mammostream.models.checkpoints import (
    _nearest_arch,
    load_byol,
    load_checkpoint,
    load_classifier,
    restore_byol,
    restore_classifier,
    save_checkpoint,
)
from mammostream.models.conversion import IMAGENET_MEAN, IMAGENET_STD, LoadReport


class ScriptHead(nn.Module):
    """A head as the scripts' library makes it: under ``layers``, no bias before a batch norm."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        first, hidden, last = dims
        self.layers = nn.Sequential(
            nn.Linear(first, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, last)
        )

    def forward(self, x):
        return self.layers(x)


class ScriptBYOL(nn.Module):
    """The scripts' model, small: numbered children of a three-channel ResNet, input normalised by mean and std 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-1])
        self.projection_head = ScriptHead(512, 24, 12)
        self.prediction_head = ScriptHead(12, 24, 12)
        self.classification_head = nn.Sequential(nn.Linear(512, 20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 2))
        self.backbone_momentum = nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-1])
        self.projection_head_momentum = ScriptHead(512, 24, 12)

    def get_features(self, x):
        return self.backbone(x).flatten(1)


class ScriptClassifier(nn.Module):
    """The scripts' classifier: the whole BYOL model with its own two-class head unused, and a separate head."""

    def __init__(self, byol: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.byol_model = byol
        self.classification_head = nn.Sequential(nn.Linear(512, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, num_classes))

    def forward(self, x):
        return self.classification_head(self.byol_model.get_features(x))


def shake(model: nn.Module) -> nn.Module:
    """Give batch norms non-trivial values, so that a lost one is noticed."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def script() -> ScriptBYOL:
    torch.manual_seed(0)
    return shake(ScriptBYOL())


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return shake(torchvision.models.resnet18(weights=None))


def grey(n: int = 2, size: int = 64) -> torch.Tensor:
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(5))


def rgb(x: torch.Tensor, mean, std) -> torch.Tensor:
    m, s = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    return (x.expand(-1, 3, -1, -1) - m) / s


def ours(x: torch.Tensor) -> torch.Tensor:
    return (x - MEAN) / STD


def assert_first_layers_agree(backbone: nn.Module, conv1: nn.Module, bn1: nn.Module, mean, std) -> None:
    """Exact except at the padded border, where zeros stand for two slightly different greys."""
    x = grey()
    with torch.no_grad():
        expected = bn1(conv1(rgb(x, mean, std)))
        result = backbone.bn1(backbone.conv1(ours(x)))
    interior = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(result[interior], expected[interior], rtol=1e-4, atol=1e-5)


def assert_same_features(features: torch.Tensor, expected: torch.Tensor) -> None:
    cosine = nn.functional.cosine_similarity(features - features.mean(0), expected - expected.mean(0))
    assert cosine.min() > 0.99, cosine


def test_a_scripts_byol_model(script, tmp_path):
    state = script.state_dict()
    torch.save({"model_state_dict": state, "epoch": 7, "loss": 0.1}, tmp_path / "mammogram_byol_best.pth")
    checkpoint = load_checkpoint(tmp_path / "mammogram_byol_best.pth", "byol")
    report = checkpoint["load_report"]
    assert checkpoint["arch"] == "resnet18"
    assert report.missing == report.unexpected == []
    assert report.backbone_share == 1
    assert len(report.matched) == len(state)
    folded = ("conv1.weight", "bn1.running_mean")
    assert report.folded == [f"{backbone}.{name}" for backbone in ("backbone", "backbone_momentum") for name in folded]

    model = restore_byol(checkpoint, "x")
    half = ((0.5,) * 3,) * 2
    for name in ("backbone", "backbone_momentum"):
        old = getattr(script, name)
        assert_first_layers_agree(getattr(model, name), old[0], old[1], *half)
    x, inner = grey(4, 160), torch.rand(2, 64, 8, 8)
    with torch.no_grad():
        assert_same_features(model.get_features(ours(x)), script.get_features(rgb(x, *half)))
        # Away from the border, the network computes the same from the same input.
        layers = model.backbone.layer3(model.backbone.layer2(inner))
        torch.testing.assert_close(layers, script.backbone[6](script.backbone[5](inner)))
        for head in ("projection_head", "prediction_head", "projection_head_momentum", "classification_head"):
            z = torch.randn(3, 12 if head == "prediction_head" else 512)
            torch.testing.assert_close(getattr(model, head)(z), getattr(script, head)(z))


WRAPPINGS = {
    "compiled": ("_orig_mod.{}", "model_state_dict"),
    "distributed": ("module.{}", "model_state_dict"),
    "compiled and distributed": ("module._orig_mod.{}", "model_state_dict"),
    "distributed and compiled": ("_orig_mod.module.{}", "state_dict"),
    "twice distributed": ("module.module.{}", "model"),
    "a bare state dict": ("{}", None),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_scripts_byol_model_in_any_wrapping_is_the_same(script, wrapping, tmp_path):
    form, nest = WRAPPINGS[wrapping]
    state = {form.format(name): tensor for name, tensor in script.state_dict().items()}
    torch.save({nest: state, "loss": torch.tensor(0.1)} if nest else state, tmp_path / "wrapped.pth")
    torch.save({"model_state_dict": script.state_dict()}, tmp_path / "plain.pth")
    wrapped, plain = (load_checkpoint(tmp_path / f"{name}.pth", "byol") for name in ("wrapped", "plain"))
    assert wrapped["load_report"].matched == plain["load_report"].matched
    assert not wrapped["load_report"].unexpected
    states = wrapped["model_state_dict"], plain["model_state_dict"]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_backbone_compiled_within_the_model_is_found(script, tmp_path):
    state = {name.replace("backbone.", "backbone._orig_mod."): tensor for name, tensor in script.state_dict().items()}
    torch.save(state, tmp_path / "inner.pth")
    assert load_checkpoint(tmp_path / "inner.pth", "byol")["load_report"].backbone_share == 1


def test_a_script_classifier_with_its_metrics(script, tmp_path):
    torch.manual_seed(2)
    old = ScriptClassifier(script, 3).eval()
    torch.save(
        {
            "epoch": 3,
            "model_state_dict": old.state_dict(),
            "optimizer_state_dict": torch.optim.AdamW(old.parameters()).state_dict(),
            "val_metrics": {"mean_auc": np.float64(0.8), "exact": np.float32(0.1), "n": np.int64(4), "ok": np.bool_(True)},
            "config": {"batch_size": 32, "lr_head": 1e-3},
            "class_names": ["mass", "calcification", "normal"],
        },
        tmp_path / "best_classification_model.pth",
    )
    model, class_names, config = load_classifier(tmp_path / "best_classification_model.pth", torch.device("cpu"))
    assert class_names == ["mass", "calcification", "normal"]
    assert config == {"batch_size": 32, "lr_head": 1e-3}
    assert not model.training
    half = ((0.5,) * 3,) * 2
    assert_first_layers_agree(model.backbone, script.backbone[0], script.backbone[1], *half)
    z = torch.randn(4, 512)
    with torch.no_grad():
        torch.testing.assert_close(model.classification_head(z), old.classification_head(z))
        x = grey(4, 160)
        assert_same_features(model.get_features(ours(x).expand(-1, 3, -1, -1)), script.get_features(rgb(x, *half)))
    report = load_checkpoint(tmp_path / "best_classification_model.pth", None)["load_report"]
    assert not report.missing
    # A classifier does not use the BYOL model's heads.
    assert "byol_model.classification_head.0.weight" in report.unexpected
    assert "classification_head.0.weight" not in report.unexpected
    with pytest.raises(BadInput, match="holds a classifier model, not a byol model"):
        load_byol(tmp_path / "best_classification_model.pth")


@pytest.mark.parametrize("form", ["{}", "module.{}", "_orig_mod.module.{}"])
@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
def test_a_torchvision_resnet_becomes_a_backbone(resnet, form, nest, tmp_path):
    state = {form.format(name): tensor for name, tensor in resnet.state_dict().items()}
    torch.save({nest: {"model": state}} if nest else state, tmp_path / "resnet.pth")
    checkpoint = load_checkpoint(tmp_path / "resnet.pth", "byol")
    report = checkpoint["load_report"]
    assert report.unexpected == [form.format("fc.weight"), form.format("fc.bias")]
    assert report.backbone_share == 1
    assert {name.split(".")[0] for name in report.missing} == {"projection_head", "prediction_head", "classification_head"} | {
        "projection_head_momentum"
    }
    model = restore_byol(checkpoint, "x")
    assert_first_layers_agree(model.backbone, resnet.conv1, resnet.bn1, IMAGENET_MEAN, IMAGENET_STD)
    assert torch.equal(model.backbone.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)
    assert torch.equal(model.backbone_momentum.conv1.weight, model.backbone.conv1.weight)
    # --weights takes the same file.
    assert torch.equal(build_backbone("resnet18", tmp_path / "resnet.pth").conv1.weight, model.backbone.conv1.weight)


def test_weights_are_taken_from_checkpoints_too(script, tmp_path):
    torch.save({"model_state_dict": script.state_dict()}, tmp_path / "script.pth")
    backbone = build_backbone("resnet18", tmp_path / "script.pth").eval()
    assert_first_layers_agree(backbone, script.backbone[0], script.backbone[1], (0.5,) * 3, (0.5,) * 3)


def test_numbered_children_alone_are_a_scripts_backbone(script, tmp_path):
    torch.save(script.backbone.state_dict(), tmp_path / "backbone.pth")
    report = load_checkpoint(tmp_path / "backbone.pth", "byol")["load_report"]
    assert report.backbone_share == 1
    assert report.normalisation == "mean 0.5, std 0.5"


def test_older_files_without_batch_counters_are_whole(resnet, tmp_path):
    state = {name: tensor for name, tensor in resnet.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pth")
    report = load_checkpoint(tmp_path / "old.pth", "byol")["load_report"]
    assert report.backbone_share == 1
    assert not any("num_batches" in name or name.startswith("backbone.") for name in report.missing)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_architecture_is_found_by_its_tensors(arch):
    with torch.device("meta"):
        state = build_backbone(arch).state_dict()
    found = {f"backbone.{name}": tensor for name, tensor in state.items()}
    found.pop(next(iter(found)))  # the first convolution's weight
    assert _nearest_arch(found) == arch


def test_a_torchvision_convnext(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.convnext_tiny(weights=None).eval()
    nn.init.normal_(net.features[0][0].bias, std=0.2)
    torch.save({"model": {f"module.{name}": tensor for name, tensor in net.state_dict().items()}}, tmp_path / "convnext.pth")
    checkpoint = load_checkpoint(tmp_path / "convnext.pth", "byol")
    report = checkpoint["load_report"]
    assert (checkpoint["arch"], report.backbone_share) == ("convnext_tiny", 1)
    assert report.folded[:2] == ["backbone.features.0.0.weight", "backbone.features.0.0.bias"]
    assert report.unexpected == ["module.classifier.2.weight", "module.classifier.2.bias"]  # of ImageNet's classes
    assert not any(name.startswith("backbone.") for name in report.missing)
    backbone = restore_byol(checkpoint, "x").backbone
    x = grey(2, 64)
    with torch.no_grad():
        expected = net.features[:2](rgb(x, IMAGENET_MEAN, IMAGENET_STD))
        torch.testing.assert_close(backbone.features[:2](ours(x)), expected, rtol=1e-3, atol=1e-4)


def test_one_channel_is_left_as_it_is(tmp_path):
    state = build_backbone("resnet18").state_dict()
    torch.save(state, tmp_path / "grey.pth")
    checkpoint = load_checkpoint(tmp_path / "grey.pth", "byol")
    assert not checkpoint["load_report"].folded
    assert torch.equal(checkpoint["model_state_dict"]["backbone.conv1.weight"], state["conv1.weight"])


def test_a_few_lost_tensors_are_reported_and_many_refused(resnet, tmp_path):
    state = resnet.state_dict()
    names = [name for name in state if "num_batches" not in name and not name.startswith("fc.")]
    few = set(names[-5:])
    torch.save({n: t for n, t in state.items() if n not in few}, tmp_path / "few.pth")
    checkpoint = load_checkpoint(tmp_path / "few.pth", "byol")
    report = checkpoint["load_report"]
    assert few <= {name.removeprefix("backbone.") for name in report.missing}
    assert report.backbone_share == pytest.approx(1 - 5 / len(names))
    assert torch.isfinite(restore_byol(checkpoint, "x").backbone.layer4[1].bn2.weight).all()

    many = set(names[-13:])  # of 100
    torch.save({n: t for n, t in state.items() if n not in many} | {"odd.weight": torch.zeros(1)}, tmp_path / "many.pth")
    with pytest.raises(
        BadInput, match=r"only 87% of the tensors of resnet18.*missing: backbone\.layer4.*odd\.weight"
    ) as caught:
        load_checkpoint(tmp_path / "many.pth", "byol")
    assert "\n" not in str(caught.value)


def test_tensors_of_other_shapes_do_not_count(resnet, tmp_path):
    state = {name: t.reshape(*t.shape, 1) if t.ndim else t for name, t in resnet.state_dict().items()}
    torch.save(state, tmp_path / "shapes.pth")
    with pytest.raises(BadInput, match="only 0% of the tensors"):
        load_byol(tmp_path / "shapes.pth")
    torch.save({"weights": 3}, tmp_path / "none.pth")
    with pytest.raises(BadInput, match="only 0% of the tensors"):
        load_byol(tmp_path / "none.pth")


def test_a_classifier_without_its_whole_head_is_refused(script, tmp_path):
    state = ScriptClassifier(script, 2).state_dict()
    del state["classification_head.0.bias"]
    state["byol_model.classification_head.0.bias"] = torch.zeros(16)  # of another head: not a substitute
    torch.save({"model_state_dict": state, "class_names": ["a", "b"]}, tmp_path / "c.pth")
    with pytest.raises(BadInput, match=r"no tensor 'classification_head\.0\.bias'"):
        load_classifier(tmp_path / "c.pth")
    torch.save({"model_state_dict": state, "class_names": None}, tmp_path / "c.pth")
    with pytest.raises(BadInput, match="has no 'class_names'"):
        load_classifier(tmp_path / "c.pth")


def test_the_report_says_what_was_done_with_the_tensors():
    names = [f"backbone.layer{n}" for n in range(5)]
    report = LoadReport("checkpoint x.pth", "resnet18", "mean 0.5, std 0.5", names, names[:1], ["a", "b"], [])
    assert report.lines() == [
        "checkpoint x.pth: resnet18, 5 tensors matched, input normalised by mean 0.5, std 0.5",
        "  folded from three channels to one: 1 (backbone.layer0)",
        "  missing, left as initialised: 2 (a, b)",
    ]
    assert re.search(r"5 \(.*layer2, \.\.\.\)", LoadReport("x", "y", "z", [], [], names, []).lines()[1])


def test_a_converted_checkpoint_can_be_saved_as_one_of_this_package(script, tmp_path):
    torch.save({"model_state_dict": script.state_dict()}, tmp_path / "old.pth")
    model = load_byol(tmp_path / "old.pth")
    checkpoint = load_checkpoint(tmp_path / "old.pth", "byol")
    kept = {name: value for name, value in checkpoint.items() if name != "load_report"}
    save_checkpoint(tmp_path / "new.pth", kept | {"model_state_dict": model.state_dict()})
    again = load_byol(tmp_path / "new.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(BadInput, match="not a classifier"):
        restore_classifier(load_checkpoint(tmp_path / "new.pth", "classifier"), "x")
