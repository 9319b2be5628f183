"""Backbones: shapes, weights, and the exactness of folding three channels into one."""

import copy
import urllib.error

import pytest
import torch
import torchvision
from torch import nn

from mammostream.common.errors import BadInput
from mammostream.common.normalisation import MEAN, STD
from mammostream.models.architectures import ARCHITECTURES
from mammostream.models.backbones import build_backbone, feature_dim, to_channels, with_input_channels
from mammostream.models.byol import MammogramBYOL
from mammostream.models.checkpoints import save_checkpoint
from mammostream.models.conversion import IMAGENET_MEAN, IMAGENET_STD, fold_first_convolution


def three_channel_resnet() -> torch.nn.Module:
    """A ResNet-18 in evaluation mode whose batch norm has non-trivial values."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    torch.nn.init.normal_(net.bn1.running_mean)
    torch.nn.init.uniform_(net.bn1.running_var, 0.5, 2)
    torch.nn.init.normal_(net.bn1.weight)
    torch.nn.init.normal_(net.bn1.bias)
    return net


def three_channel_convnext() -> torch.nn.Module:
    """A ConvNeXt-T in evaluation mode whose stem bias and block scales have non-trivial values."""
    torch.manual_seed(0)
    net = torchvision.models.convnext_tiny(weights=None).eval()
    torch.nn.init.normal_(net.features[0][0].bias, std=0.2)
    for name, parameter in net.named_parameters():
        if name.endswith("layer_scale"):
            torch.nn.init.uniform_(parameter, 0.2, 1)
    return net


def imagenet_input(x: torch.Tensor) -> torch.Tensor:
    m, s = (torch.tensor(v, dtype=x.dtype).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x.expand(-1, 3, -1, -1) - m) / s


DIMS = {
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "convnext_tiny": 768,
    "resnet18_narrow": 128,
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_gives_flat_features(arch):
    dim = DIMS[arch]
    backbone = build_backbone(arch).eval()
    assert (backbone.arch, backbone.num_features) == (arch, dim)
    with torch.no_grad():
        assert backbone(torch.zeros(2, 1, 32, 32)).shape == (2, dim)


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(BadInput, match=r"'resnet5O' \(did you mean 'resnet50'\?\)"):
        build_backbone("resnet5O")


@pytest.mark.parametrize(("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), ((0.5,) * 3, (0.5,) * 3)])
def test_folding_is_exact_away_from_the_border(mean, std):
    net = three_channel_resnet().double()
    x = torch.rand(2, 1, 40, 40, dtype=torch.float64)
    m, s = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
    with torch.no_grad():
        expected = net.bn1(net.conv1((x.expand(-1, 3, -1, -1) - m) / s))
        weight, constant = fold_first_convolution(net.conv1.weight, mean, std)
        net.bn1.running_mean.sub_(constant)
        y = torch.nn.functional.conv2d((x - MEAN) / STD, weight, stride=2, padding=3)
        result = net.bn1(y)
    interior = (..., slice(2, -2), slice(2, -2))  # 7 x 7, stride 2, padding 3: two outputs touch each border
    torch.testing.assert_close(result[interior], expected[interior], rtol=1e-12, atol=1e-12)


def test_three_channel_weights_from_a_file_are_folded(tmp_path):
    net = three_channel_resnet()
    torch.save(net.state_dict(), tmp_path / "rgb.pth")
    backbone = build_backbone("resnet18", tmp_path / "rgb.pth").eval()
    weight, constant = fold_first_convolution(net.conv1.weight)
    assert torch.equal(backbone.conv1.weight, weight)
    assert torch.equal(backbone.bn1.running_mean, (net.bn1.running_mean.double() - constant).float())
    assert torch.equal(backbone.layer4[1].conv2.weight, net.layer4[1].conv2.weight)
    # The whole network, on tiles large enough that the border contributes little to the average.
    x = torch.rand(1, 1, 256, 256)
    net.fc = torch.nn.Identity()
    with torch.no_grad():
        folded, replicated = backbone((x - MEAN) / STD), net(imagenet_input(x))
    assert torch.nn.functional.cosine_similarity(folded, replicated).item() > 0.999


def test_a_three_channel_convnext_from_a_file_is_the_same_network(tmp_path):
    """Exact for every pixel: its first convolution has no padding, and its bias absorbs the constant."""
    net = three_channel_convnext()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in net.state_dict().items()}}, tmp_path / "rgb.pth")
    backbone = build_backbone("convnext_tiny", tmp_path / "rgb.pth").eval()
    assert torch.equal(backbone.features[7][2].block[5].weight, net.features[7][2].block[5].weight)
    net.classifier[2] = torch.nn.Identity()
    x = torch.rand(2, 1, 64, 32)
    with torch.no_grad():
        stem, expected_stem = backbone.features[0]((x - MEAN) / STD), net.features[0](imagenet_input(x))
        features, expected = backbone((x - MEAN) / STD), net(imagenet_input(x))
    torch.testing.assert_close(stem, expected_stem, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


def test_convnext_drops_no_blocks_at_random():
    backbone = build_backbone("convnext_tiny").train()
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone(x), backbone(x))


def test_the_online_backbone_of_a_checkpoint_starts_another(tmp_path):
    torch.manual_seed(1)
    model = MammogramBYOL(build_backbone("resnet18"), hidden_dim=8, proj_dim=4)
    for parameter in model.backbone_momentum.parameters():
        parameter.data.zero_()
    checkpoint = {"kind": "byol", "arch": "resnet18", "model_state_dict": model.state_dict(), "config": {}}
    save_checkpoint(tmp_path / "mammogram_byol_best.pth", checkpoint)
    backbone = build_backbone("resnet18", tmp_path / "mammogram_byol_best.pth")
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], tensor), name


def test_the_narrow_resnet_is_a_resnet18_with_a_quarter_of_the_channels():
    wide, narrow = (build_backbone(arch).state_dict() for arch in ("resnet18", "resnet18_narrow"))
    assert set(narrow) == set(wide)
    for name, tensor in wide.items():
        if tensor.ndim:
            quarter = [1 if n == 1 else n if n in (3, 7) and at > 1 else n // 4 for at, n in enumerate(tensor.shape)]
            assert list(narrow[name].shape) == quarter, name
    with pytest.raises(BadInput, match="no ImageNet weights of resnet18_narrow"):
        build_backbone("resnet18_narrow", "imagenet")


def test_weights_none_are_drawn_by_the_seed():
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(build_backbone("resnet18", "none").conv1.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_one_channel_weights_without_batch_counters_load_as_they_are(tmp_path):
    state = {k: v for k, v in build_backbone("resnet18").state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "grey.pth")
    backbone = build_backbone("resnet18", str(tmp_path / "grey.pth"))
    assert torch.equal(backbone.conv1.weight, state["conv1.weight"])


def test_imagenet_weights_come_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    net = three_channel_resnet()
    torch.save(net.state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    assert torch.equal(build_backbone("resnet18", "imagenet").bn1.weight, net.bn1.weight)


def test_imagenet_weights_without_a_network_say_how_to_fix_it(monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(BadInput, match=r"https://.*resnet18.*\.pth.* pass --weights FILE"):
        build_backbone("resnet18", "imagenet")


def test_weights_that_cannot_be_used_name_the_reason(tmp_path):
    with pytest.raises(BadInput, match=r"does not exist.*did you mean 'imagenet'"):
        build_backbone("resnet18", "imagnet")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(BadInput, match="damaged or holds more"):
        build_backbone("resnet18", tmp_path / "text.pth")
    torch.save(build_backbone("resnet34").state_dict(), tmp_path / "r34.pth")
    with pytest.raises(BadInput, match=r"for resnet18 does not fit .* extra tensor 'layer1\.2\.conv1\.weight'"):
        build_backbone("resnet18", tmp_path / "r34.pth")


def test_tiles_get_the_channels_that_the_backbone_takes():
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(to_channels(x, 1), x.mean(1, keepdim=True))
    assert to_channels(x, 3).data_ptr() == to_channels(x[:, :1], 1).data_ptr() == x.data_ptr()
    torch.testing.assert_close(to_channels(x[:, :1], 3), x[:, :1].repeat(1, 3, 1, 1))
    for bad, channels in ((x[0], 1), (x[:, :2], 1), (x[:, :2], 3), (x, 4)):
        with pytest.raises(BadInput, match="the model takes tiles of shape"):
            to_channels(bad, channels)


def test_a_backbone_takes_what_its_first_convolution_takes():
    three = nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)))
    assert with_input_channels(three).input_channels == 3
    assert copy.deepcopy(three).input_channels == 3
    assert with_input_channels(build_backbone("resnet18")).input_channels == 1
    assert with_input_channels(nn.Flatten()).input_channels == 1


def test_feature_dim_is_inferred_given_or_refused():
    backbone = build_backbone("resnet18")
    assert feature_dim(backbone) == feature_dim(backbone, 512) == 512
    assert feature_dim(torch.nn.Flatten(), 7) == 7
    with pytest.raises(BadInput, match="gives 512 features; pass input_dim=512"):
        feature_dim(backbone, 2048)
    with pytest.raises(BadInput, match="pass input_dim"):
        feature_dim(torch.nn.Flatten())
