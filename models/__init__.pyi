from .backbones import build_backbone as build_backbone
from .byol import MammogramBYOL as MammogramBYOL
from .checkpoints import load_byol as load_byol
from .checkpoints import load_classification_model as load_classification_model
from .checkpoints import load_classifier as load_classifier
from .classifier import MammogramClassifier as MammogramClassifier
