"""DICOM: from stored values to pixels, brighter where tissue is denser, and their display by the file's VOI LUT or window."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mammostream.preprocess.backend import backend_of
from mammostream.preprocess.dicom_dataset import integer, items, numbers, raw_text, text
from mammostream.preprocess.dicom_pixels import Stored

if TYPE_CHECKING:
    import pydicom


class Display(NamedTuple):
    """The display by a file's own VOI LUT or window.

    Attributes
    ----------
    table
        (N,) float32 in [0, 1]: the display of each pixel value.
    name
        Where it is from, in words.
    """

    table: np.ndarray
    name: str


def to_pixels(stored: Any, dataset: pydicom.Dataset, inverted: bool) -> tuple[Any, np.ndarray]:
    """Return pixels that start at 0 and are brighter where tissue is denser, and the stored value each pixel value had.

    Parameters
    ----------
    stored
        (H, W) stored values.
    dataset
        What the file says of padding.
    inverted
        Whether low stored values are bright.

    Returns
    -------
    pixels, shown
        (H, W) uint8 or uint16, and (N,) int32: pixel value v was stored as ``shown[v]``.
    """
    xp = backend_of(stored).xp
    padding = _padding(stored, dataset, inverted)
    # Padding may lie far outside the film's values: it has no say in their range.
    film = stored if padding is None else xp.where(padding, stored.ravel()[int((~padding).argmax())], stored)
    high = int(film.max())
    low = int(film.min()) if inverted or stored.dtype.kind == "i" else 0
    low = low if inverted else min(low, 0)
    # Differences of a width's own unsigned type, modulo its range, are exact: the range fits.
    kind = np.dtype(f"u{stored.dtype.itemsize}")
    end = kind.type((high if inverted else low) & (2 ** (8 * kind.itemsize) - 1))
    bare = film.view(kind)
    if inverted:
        pixels = end - bare
    else:
        pixels = bare - end if low else bare
    if padding is not None:
        pixels = xp.where(padding, kind.type(0), pixels)
    shown = np.arange(low, high + 1, dtype=np.int32)
    return pixels, shown[::-1] if inverted else shown


def _padding(stored: Any, dataset: pydicom.Dataset, inverted: bool) -> Any | None:
    """Return where the film is padding, as (H, W) bool, or None where it has none to undo.

    Padding is what PixelPaddingValue, or the range from it to PixelPaddingRangeLimit, says (PS3.3 C.7.5.1.1.2). Some files
    name a value there that tissue has too: where padding is not the darkest of the film, only what hangs together with the
    image's border counts.
    """
    first, last = (integer(dataset, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if first is None:
        return None
    last = first if last is None else last
    if stored.dtype.kind == "i":  # some files write signed padding as if it were unsigned
        first, last = (int(np.int64(e).astype(stored.dtype)) for e in (first, last))
    first, last = min(first, last), max(first, last)
    if not inverted and last <= 0 and stored.dtype.kind == "u":
        return None  # it is background already
    kinds = np.iinfo(stored.dtype)
    if last < kinds.min or first > kinds.max:
        return None
    first, last = max(first, kinds.min), min(last, kinds.max)  # CuPy compares with no number that the type cannot hold
    backend = backend_of(stored)
    xp = backend.xp
    padding = (stored >= first) & (stored <= last)
    if not padding.any() or padding.all():
        return None
    if stored.max() <= last if inverted else stored.min() >= first:
        return padding  # nothing is darker
    parts, _ = backend.ndimage.label(padding)
    at_border = xp.zeros(int(parts.max()) + 1, bool)
    for edge in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
        at_border[edge] = True
    at_border[0] = False
    return at_border[parts] if at_border.any() else None


# The modality's transform: from stored values to what the file's windows count in


class Modality(NamedTuple):
    """A modality LUT, a rescale, or neither (PS3.3 C.11.1)."""

    lut: tuple[np.ndarray, int, int] | None = None  # entries, first value mapped, bits
    rescale: tuple[float, float] | None = None  # slope and intercept

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return (N,) int32 stored values in the modality's units: float64 where they are rescaled."""
        if self.lut is not None:
            entries, first, _ = self.lut
            return entries[np.clip(values - first, 0, len(entries) - 1)]
        if self.rescale is not None:
            return values.astype(np.float64) * self.rescale[0] + self.rescale[1]
        return values

    def falls(self, stored: Any) -> bool:
        """Tell whether it turns a film's range upside down."""
        if self.lut is None:
            return self.rescale is not None and self.rescale[0] < 0
        ends = self(np.array([int(stored.min()), int(stored.max())], np.int32))
        return bool(ends[0] > ends[1])

    def output_range(self, bits: int, signed: bool) -> tuple[float, float]:
        """Return what it makes of the lowest and the highest value of `bits` bits."""
        if self.lut is not None:
            return 0.0, 2.0 ** self.lut[2] - 1
        low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
        slope, intercept = self.rescale or (1.0, 0.0)
        return low * slope + intercept, high * slope + intercept


def modality_of(dataset: pydicom.Dataset, flags: dict[str, str]) -> Modality | None:
    """Return the file's modality LUT or rescale; None, with the flag ``rescale_ignored``, where it makes no sense."""
    item = next(iter(items(dataset, "ModalityLUTSequence")), None)
    if item is not None:
        lut = _lut(item, bool(dataset.original_encoding[1]), signed=bool(dataset.PixelRepresentation))
        if lut is None:
            flags["rescale_ignored"] = "ModalityLUTSequence holds no table"
            return None
        return Modality(lut=lut)
    names = ("RescaleSlope", "RescaleIntercept")
    if not all(raw_text(dataset, name) for name in names):  # some files carry these without a value
        return Modality()
    slope, intercept = (_first(dataset, name) for name in names)
    if not slope or intercept is None:
        flags["rescale_ignored"] = ", ".join(f"{name} {raw_text(dataset, name)}" for name in names)
        return None
    return Modality(rescale=(slope, intercept))


def _first(dataset: pydicom.Dataset, name: str) -> float | None:
    """Return an attribute's first number, None where it is none or not finite."""
    found = numbers(dataset, name)
    return found[0] if found and math.isfinite(found[0]) else None


def _lut(item: pydicom.Dataset, little: bool, signed: bool) -> tuple[np.ndarray, int, int] | None:
    """Return a LUT's entries (uint16), the first value that it maps, and the bits that it says to have; None if it is none."""
    try:
        count, first, depth = (int(v) for v in item.LUTDescriptor)
        data: Any = item.LUTData
        if isinstance(data, bytes):
            count = count or 2**16
            kind = "u1" if len(data) in (count, count + count % 2) and count > 1 else "<u2" if little else ">u2"
            entries = np.frombuffer(data[: len(data) // np.dtype(kind).itemsize * np.dtype(kind).itemsize], kind)
        else:
            entries = np.atleast_1d(np.asarray(data)).astype(np.int64) & 0xFFFF
    except Exception:  # missing, empty or torn: pydicom and NumPy raise what they run into
        return None
    count = count & 0xFFFF or 2**16  # 0 stands for 65536
    if len(entries) < count or not depth:
        return None
    if first > 0x7FFF and signed:  # some files write it as if it were unsigned
        first -= 0x10000
    return entries[:count].astype(np.uint16), first, depth


# The display


def display_of(
    dataset: pydicom.Dataset, shown: np.ndarray, stored: Stored, modality: Modality | None, flags: dict[str, str]
) -> Display | None:
    """Return the display of stored values, or None where the file has no valid VOI LUT or window.

    The file's first VOI LUT counts, else its first window.

    Parameters
    ----------
    dataset
        What the file says.
    shown
        (N,) int32 stored values.
    stored
        The film's values and how many of their bits count.
    modality
        As :func:`modality_of` returns it.
    flags
        Gets ``window_ignored`` and ``voi_lut_bits``, with the numbers.
    """
    window = {name: raw_text(dataset, name) for name in ("WindowCenter", "WindowWidth")}
    item = next(iter(items(dataset, "VOILUTSequence")), None)
    has_lut = item is not None and bool(item.get("LUTDescriptor")) and bool(item.get("LUTData"))
    if modality is None:
        if has_lut or all(window.values()):
            flags["window_ignored"] = f"it counts in units of an invalid transform: {flags['rescale_ignored']}"
        return None
    values = modality(shown)
    found = None
    if has_lut:
        found = _by_lut(item, values, bool(dataset.original_encoding[1]), flags)
        if found is None:
            flags["window_ignored"] = "VOILUTSequence holds no table"
    if found is None and all(window.values()):
        found = _by_window(dataset, values, modality.output_range(stored.bits, bool(dataset.PixelRepresentation)))
        if found is None:
            flags["window_ignored"] = ", ".join(f"{name} {value}" for name, value in window.items())
    return found


def _by_lut(item: Any, values: np.ndarray, little: bool, flags: dict[str, str]) -> Display | None:
    rounded = np.rint(values).astype(np.int32)
    table = _lut(item, little, signed=bool(rounded.min() < 0))
    if table is None or not table[0].any():
        return None
    entries, first, depth = table
    full, largest = 2**depth - 1, int(entries.max())
    if not full // 2 < largest <= full:  # 16 bits said and 12 used, or the other way round: as viewers do
        flags["voi_lut_bits"] = f"its VOI LUT says {depth} bits, its largest entry is {largest}"
        full = largest
    display = entries[np.clip(rounded - first, 0, len(entries) - 1)] / full
    return Display(np.clip(display, 0, 1).astype(np.float32), f"VOI LUT of {len(entries)} entries")


def _by_window(dataset: pydicom.Dataset, values: np.ndarray, output: tuple[float, float]) -> Display | None:
    """Return the display by the first window (PS3.3 C.11.2.1.2 and C.11.2.1.3); None where that is invalid."""
    centre, width = (_first(dataset, name) for name in ("WindowCenter", "WindowWidth"))
    function = text(dataset, "VOILUTFunction").upper()
    linear = function not in ("LINEAR_EXACT", "SIGMOID")
    if centre is None or width is None or width <= 0 or (linear and width < 1):
        return None
    name = f"window {centre:g}/{width:g}"
    low, high = output
    values = values.astype(np.float64)
    with np.errstate(all="ignore"):
        if function == "SIGMOID":
            shown = (high - low) / (1 + np.exp(-4 * (values - centre) / width)) + low
        else:
            if linear:
                centre, width = centre - 0.5, width - 1
            below, above = values <= centre - width / 2, values > centre + width / 2
            shown = np.where(below, low, high)
            between = ~below & ~above
            shown[between] = ((values[between] - centre) / width + 0.5) * (high - low) + low
        display = (shown - low) / (high - low)
    return Display(np.clip(display, 0, 1).astype(np.float32), name) if np.isfinite(display).all() else None
