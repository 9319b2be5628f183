"""The guides' programs run unchanged except for their imports."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from mammostream.common.normalisation import MEAN, STD
from mammostream.models.backbones import build_backbone
from mammostream.models.byol import MammogramBYOL
from mammostream.models.checkpoints import load_byol, save_checkpoint
from mammostream.models.classifier import MammogramClassifier, build_classification_head

# "Programmatic Usage" of the classification guide. Its imports were:
#   import torch
#   from train_byol_mammo import MammogramBYOL
#   from inference_classification import load_classification_model, create_inference_transform
# and Image was not imported at all.
CLASSIFICATION_GUIDE = """
import torch
from PIL import Image
from mammostream.models import MammogramBYOL
from mammostream.models import load_classification_model
from mammostream.dali_pipelines import create_inference_transform

# Load model
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model, class_names, config = load_classification_model(
    "./classification_results/best_classification_model.pth", device
)

# Make prediction
transform = create_inference_transform()
image = Image.open("test.png").convert('RGB')
input_tensor = transform(image).unsqueeze(0).to(device)

with torch.no_grad():
    logits = model.classify(input_tensor)
    probabilities = torch.sigmoid(logits).cpu().numpy()[0]

# Get results
for i, class_name in enumerate(class_names):
    print(f"{class_name}: {probabilities[i]:.3f}")
"""

# "Usage for Classification" of the pre-training guide, which imports nothing; the names that it assumes are in `given` below.
PRETRAINING_GUIDE = """
# Load pre-trained BYOL model
model = MammogramBYOL(backbone, INPUT_DIM, HIDDEN_DIM, PROJ_DIM)
model.load_state_dict(torch.load('mammogram_byol_best.pth')['model_state_dict'])

# Extract features or classify
features = model.get_features(image_tensor)
predictions = model.classify(image_tensor)
"""

CLASSES = ["mass", "calcification", "normal"]


def probabilities_of(logits: torch.Tensor) -> list[float]:
    return torch.sigmoid(logits)[0].tolist()


@pytest.fixture
def image(tmp_path, monkeypatch) -> torch.Tensor:
    """A grey image ``test.png`` in the working folder: (1, 1, 64, 64) in [0, 1]."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classification_results").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(pixels).save("test.png")
    return torch.from_numpy(pixels)[None, None] / 255


def run_the_guide(capsys) -> list[float]:
    """Run the example and return the probabilities that it prints, checking the names before them."""
    exec(compile(CLASSIFICATION_GUIDE, "guide", "exec"), {})
    lines = [line.split(": ") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == CLASSES
    return [float(value) for _, value in lines]


def test_the_classification_guides_example(image, capsys):
    torch.manual_seed(0)
    backbone = build_backbone("resnet18")
    model = MammogramClassifier(backbone, build_classification_head(512, 3)).eval()
    nn.init.normal_(model.classification_head[3].bias, std=2)
    save_checkpoint(
        "classification_results/best_classification_model.pth",
        {
            "kind": "classifier",
            "arch": "resnet18",
            "model_state_dict": model.state_dict(),
            "config": {},
            "class_names": CLASSES,
        },
    )
    with torch.no_grad():
        expected = probabilities_of(model.classify((image - MEAN) / STD))
    printed = run_the_guide(capsys)
    assert printed == pytest.approx(expected, abs=1e-3)
    assert np.ptp(printed) > 0.1


def test_the_classification_guides_example_on_a_checkpoint_of_its_script(image, capsys):
    torch.manual_seed(0)
    resnet = nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-1])
    old = nn.ModuleDict({"backbone": resnet, "classification_head": build_classification_head(512, 3)}).eval()
    nn.init.normal_(old["classification_head"][3].bias, std=2)
    torch.save(
        {"model_state_dict": old.state_dict(), "class_names": CLASSES, "config": {"batch_size": 32}},
        "classification_results/best_classification_model.pth",
    )
    with torch.no_grad():
        features = resnet((image.expand(-1, 3, -1, -1) - 0.5) / 0.5).flatten(1)
        expected = probabilities_of(old["classification_head"](features))
    # Not exact: zeros at the padded border stand for another grey, and much of so small an image is border.
    assert run_the_guide(capsys) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_pretraining_guides_example(image, channels):
    torch.manual_seed(0)
    byol = MammogramBYOL(build_backbone("resnet18"), 512, 24, 12).eval()
    save_checkpoint(
        "mammogram_byol_best.pth", {"kind": "byol", "arch": "resnet18", "model_state_dict": byol.state_dict(), "config": {}}
    )
    given = {
        "torch": torch,
        "MammogramBYOL": MammogramBYOL,
        "backbone": build_backbone("resnet18").eval(),
        "INPUT_DIM": 512,
        "HIDDEN_DIM": 24,
        "PROJ_DIM": 12,
        "image_tensor": ((image - MEAN) / STD).expand(-1, channels, -1, -1),
    }
    torch.manual_seed(1)  # the head's dropout: the example does not switch to evaluation
    exec(compile(PRETRAINING_GUIDE, "guide", "exec"), given)
    with torch.no_grad():
        torch.testing.assert_close(given["features"], byol.get_features((image - MEAN) / STD), rtol=1e-4, atol=1e-5)
    assert given["predictions"].shape == (1, 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_pretraining_guides_example_with_the_guides_own_backbone(image, channels):
    """Three channels, numbered children: what both guides build."""

    def build():
        return nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-1])

    torch.manual_seed(0)
    byol = MammogramBYOL(build(), 512, 24, 12)
    byol(*torch.randn(2, 4, 1, 64, 64)).loss.backward()  # it trains on one-channel tiles
    byol.update_target(0.9)
    byol.eval()
    torch.save({"model_state_dict": byol.state_dict()}, "mammogram_byol_best.pth")
    given = {
        "torch": torch,
        "MammogramBYOL": MammogramBYOL,
        "backbone": build().eval(),
        "INPUT_DIM": 512,
        "HIDDEN_DIM": 24,
        "PROJ_DIM": 12,
        "image_tensor": ((image - 0.5) / 0.5).expand(-1, channels, -1, -1),
    }
    exec(compile(PRETRAINING_GUIDE, "guide", "exec"), given)
    with torch.no_grad():
        expected = byol.backbone(((image - 0.5) / 0.5).expand(-1, 3, -1, -1)).flatten(1)
    torch.testing.assert_close(given["features"].detach(), expected, rtol=1e-4, atol=1e-5)
    assert given["predictions"].shape == (1, 2)
    # Colours are kept, not averaged.
    coloured = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(byol.get_features(coloured), byol.backbone(coloured).flatten(1))
        classifier = MammogramClassifier.from_byol(byol, 5).eval()
        assert classifier(coloured).shape == classifier(coloured[:, :1]).shape == (2, 5)
    # The commands read it as well: folded to one channel, for this package's normalisation.
    loaded = load_byol("mammogram_byol_best.pth")
    with torch.no_grad():
        found = loaded.get_features((image - MEAN) / STD)
    assert torch.nn.functional.cosine_similarity(found, expected).item() > 0.99


def test_the_guides_resnet50():
    backbone = nn.Sequential(*list(torchvision.models.resnet50(weights=None).children())[:-1])
    byol = MammogramBYOL(backbone, 2048, 64, 32).eval()
    with torch.no_grad():
        assert byol.get_features(torch.randn(1, 1, 64, 64)).shape == (1, 2048)
