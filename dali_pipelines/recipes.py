"""What may vary in an augmented view (:class:`View`), the recipes, and views as YAML. Plain data that does not need DALI."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mammostream.common.errors import BadInput, nearest
from mammostream.common.options import read_mapping


@dataclass(frozen=True)
class View:
    """What may vary in a view; every field's default changes nothing.

    All draws are uniform and independent of each other, of other tiles and of the tile's other view.

    Parameters
    ----------
    rotation_deg
        Largest rotation in either direction, in degrees.
    scale
        Smallest and largest magnification; 2 shows details twice as large.
    horizontal_flip, vertical_flip
        Probability of mirroring left-right, top-bottom.
    translation
        Largest shift along each axis in either direction, as a fraction of the tile's edge.
    crop_area
        Smallest and largest fraction of the tile's area, in (0, 1], that a square crop anywhere in the tile keeps before it
        is magnified to the tile's size. None: no crop.
    perspective
        Largest tilt about each axis in either direction, below 0.5: at most, lines along one edge become ``1 + perspective``
        times as long as at the centre, and along the opposite edge ``1 - perspective`` times.
    brightness
        Largest relative change, below 1: pixels are multiplied by a factor in ``1 ± brightness``.
    contrast
        Largest relative change, below 1: differences from the mean of the whole tile are multiplied by a factor in
        ``1 ± contrast``.
    blur_probability, blur_sigma
        Probability of a Gaussian blur, and the smallest and largest standard deviation of its kernel in pixels of the view.
    noise
        Largest standard deviation of added Gaussian noise, in units of full scale.

    Raises
    ------
    BadInput
        A field is outside its range.
    """

    rotation_deg: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    translation: float = 0.0
    crop_area: tuple[float, float] | None = None
    perspective: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    noise: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "rotation_deg": (0 <= self.rotation_deg <= 180, "0 to 180"),
            "scale": (0 < self.scale[0] <= self.scale[1], "two numbers above 0, the smaller first"),
            "horizontal_flip": (0 <= self.horizontal_flip <= 1, "0 to 1"),
            "vertical_flip": (0 <= self.vertical_flip <= 1, "0 to 1"),
            "translation": (0 <= self.translation <= 1, "0 to 1"),
            "crop_area": (
                self.crop_area is None or 0 < self.crop_area[0] <= self.crop_area[1] <= 1,
                "two numbers above 0 and up to 1, the smaller first",
            ),
            "perspective": (0 <= self.perspective < 0.5, "0 to below 0.5"),
            "brightness": (0 <= self.brightness < 1, "0 to below 1"),
            "contrast": (0 <= self.contrast < 1, "0 to below 1"),
            "blur_probability": (0 <= self.blur_probability <= 1, "0 to 1"),
            "blur_sigma": (0 < self.blur_sigma[0] <= self.blur_sigma[1], "two numbers above 0, the smaller first"),
            "noise": (0 <= self.noise <= 1, "0 to 1"),
        }
        for name, (inside, allowed) in ranges.items():
            if not inside:
                raise BadInput(f"view: {name} {getattr(self, name)} is out of range; give {allowed}")

    @property
    def moves_pixels(self) -> bool:
        """Whether the view changes geometry at all; if not, the tile is not resampled."""
        geometry = ("rotation_deg", "scale", "horizontal_flip", "vertical_flip", "translation", "crop_area", "perspective")
        return any(getattr(self, name) != getattr(_IDENTITY, name) for name in geometry)


_IDENTITY = View()

# The guide's list ends with "grayscale": on tiles of one channel it is the identity, so there is nothing to apply.
_GUIDE = (
    View(
        rotation_deg=15,
        scale=(0.85, 1.15),
        horizontal_flip=0.5,
        vertical_flip=0.5,
        brightness=0.3,
        contrast=0.3,
    ),
    View(rotation_deg=25, brightness=0.4, contrast=0.4, perspective=0.1, blur_probability=0.5, blur_sigma=(0.1, 2.0)),
)

# For mammograms: crops make the views differ in content and size, as BYOL needs. Blur is at most one pixel, and with
# recipe_views at most 0.1 mm: a wider kernel would wipe out micro-calcifications.
_MAMMO_CHANGES: dict[str, Any] = {
    "translation": 0.05,
    "crop_area": (0.3, 1.0),
    "horizontal_flip": 0.5,
    "blur_sigma": (0.1, 1.0),
}
_MAMMO = (replace(_GUIDE[0], **_MAMMO_CHANGES), replace(_GUIDE[1], **_MAMMO_CHANGES))

RECIPES: dict[str, tuple[View, View]] = {"guide": _GUIDE, "mammo": _MAMMO}
"""The two views of pre-training by recipe name, for pixels of up to 0.1 mm."""
_MAMMO_BLUR_MM = 0.1


def recipe_views(name: str, pixel_mm: float | None) -> tuple[View, View]:
    """Return a recipe's two views for pixels of a size: ``mammo`` never blurs by more than 0.1 mm.

    Parameters
    ----------
    name
        ``guide`` or ``mammo``.
    pixel_mm
        Edge of a view's pixel in mm; None if it is unknown, which is treated as at most 0.1 mm.
    """
    views = RECIPES[name]
    if name != "mammo" or pixel_mm is None:
        return views
    widest = min(views[0].blur_sigma[1], _MAMMO_BLUR_MM / pixel_mm)
    first, second = (replace(view, blur_sigma=(min(view.blur_sigma[0], widest), widest)) for view in views)
    return first, second


TRAIN_VIEW = View(rotation_deg=10, scale=(0.9, 1.1), horizontal_flip=0.5, vertical_flip=0.5, brightness=0.3, contrast=0.3)
"""Augmentation for training with labels: little geometry, to keep what a radiologist would see, and as much change of
brightness and contrast as there is between films of different scanners and exposures."""

_NAMES = ("view1", "view2")


def views_to_dict(views: Sequence[View]) -> dict[str, dict[str, Any]]:
    """Return the two views as ``{"view1": {field: value}, "view2": …}`` of plain types, suitable for YAML and JSON.

    Examples
    --------
    >>> views_to_dict(RECIPES["guide"])["view1"]["scale"]
    [0.85, 1.15]
    """

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return {
        name: {field: plain(value) for field, value in dataclasses.asdict(view).items()}
        for name, view in zip(_NAMES, views, strict=True)
    }


def views_from_dict(mapping: Mapping[str, Any], what: str) -> tuple[View, View]:
    """Return the two views described by the output of :func:`views_to_dict`; missing fields keep the default (no change).

    Parameters
    ----------
    mapping
        ``view1`` and ``view2``, each a mapping of fields of :class:`View`.
    what
        Where the mapping comes from, for the error.

    Raises
    ------
    BadInput
        A view or field is unknown, missing, of the wrong kind or out of range; the error names it.
    """
    for name in mapping:
        if name not in _NAMES:
            raise BadInput(f"{what} has the unknown key '{name}'{nearest(name, _NAMES)}; give view1 and view2")
    for name in _NAMES:
        if not isinstance(mapping.get(name), Mapping):
            raise BadInput(f"{what} has no mapping '{name}'; give view1 and view2, each with the fields that vary")
    first, second = (_view(mapping[name], f"{what}, {name}") for name in _NAMES)
    return first, second


def views_from_yaml(path: Path) -> tuple[View, View]:
    """Read two views from a YAML or JSON file; see :func:`views_from_dict`.

    Raises
    ------
    BadInput
        The file is missing or does not contain two views.
    """
    return views_from_dict(read_mapping(path), str(path))


def _view(fields: Mapping[str, Any], what: str) -> View:
    known = {field.name: field for field in dataclasses.fields(View)}
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in known:
            raise BadInput(f"{what} has the unknown field '{name}'{nearest(name, known)}; its fields are: {', '.join(known)}")
        kind = str(known[name].type)  # annotations are strings here
        pair = "tuple" in kind
        if pair and isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value)):
            values[name] = tuple(map(float, value))
        elif not pair and _is_number(value):
            values[name] = float(value)
        elif value is None and "None" in kind:
            values[name] = None
        else:
            raise BadInput(f"{what}: {name} is {value!r}; give {'two numbers, such as [0.9, 1.1]' if pair else 'a number'}")
    try:
        return View(**values)
    except BadInput as error:
        raise BadInput(f"{what}: {str(error).removeprefix('view: ')}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
