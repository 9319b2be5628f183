"""The same two views made by other libraries in a torch DataLoader: the baselines of ``mammostream bench loader``.

They are written as a careful user would write them: tiles read by offset, the fastest decoder available, OpenCV with one
composed homography and one pass over the intensities, batches collated in workers of one thread each.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mammostream.dali_pipelines.intensity import FULL_SCALE, ImageFormat, scale_and_shift
from mammostream.dali_pipelines.recipes import View
from mammostream.shards.archive import read_index
from mammostream.shards.codecs import CODECS
from mammostream.shards.reading import Shard

PREFETCH = 2  # batches that each worker prepares ahead, torch's own default


class TileDataset(Dataset):
    """Tiles of shards by position: read by offset, decoded on the host, handed to `transform`.

    Parameters
    ----------
    shards
        The shards to read.
    transform
        Maps a uint8 or uint16 (H, W) tile to what the DataLoader collates.
    """

    def __init__(self, shards: Sequence[Shard], transform: Callable[[np.ndarray], Any]) -> None:
        self._tars = [str(shard.tar) for shard in shards]
        self._members = [
            (number, member)
            for number, shard in enumerate(shards)
            for sample in read_index(shard.index)
            for member in sample
            if member.extension in CODECS
        ]
        self._transform = transform
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, position: int) -> Any:
        tar, member = self._members[position]
        if tar not in self._files:
            self._files[tar] = os.open(self._tars[tar], os.O_RDONLY)
        data = os.pread(self._files[tar], member.size, member.offset)
        return self._transform(CODECS[member.extension].decode(data))


def batches(dataset: Dataset, batch_size: int, workers: int, device: str) -> Iterator[Any]:
    """Yield shuffled batches forever from a DataLoader with persistent workers."""
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        prefetch_factor=PREFETCH,
        pin_memory=device == "gpu",
        multiprocessing_context="fork",  # the default on Linux; also used where this process was spawned
        worker_init_fn=_one_thread,
    )
    while True:
        yield from loader


def _one_thread(worker: int) -> None:
    """Limit a worker to one thread, so that workers do not compete for cores."""
    torch.set_num_threads(1)
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(0)


class OpenCVViews:
    """Views of a tile with OpenCV: one homography, one resample, one gain and one offset each.

    Parameters
    ----------
    views
        What may vary in each view.
    form
        Size and normalisation of the views.
    """

    def __init__(self, views: Sequence[View], form: ImageFormat) -> None:
        self._views = tuple(views)
        self._form = form

    def __call__(self, tile: np.ndarray) -> tuple[torch.Tensor, ...]:
        # Torch gives each worker a new seed each epoch.
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        return tuple(torch.from_numpy(self._view(tile, view, rng))[None] for view in self._views)

    def _view(self, tile: np.ndarray, view: View, rng: np.random.Generator) -> np.ndarray:
        import cv2

        size = self._form.size
        mean = cv2.mean(tile)[0]
        if view.moves_pixels or size != len(tile):
            homography = draw_homography(view, len(tile), size, rng)
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            tile = cv2.warpPerspective(tile, homography, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
        if rng.random() < view.blur_probability:
            sigma = rng.uniform(*view.blur_sigma)
            window = 2 * math.ceil(3 * sigma) + 1
            tile = cv2.GaussianBlur(tile, (window, window), sigma)
        scale, shift = scale_and_shift(self._form.mean, self._form.std)
        scale *= FULL_SCALE / np.iinfo(tile.dtype).max
        brightness = rng.uniform(1 - view.brightness, 1 + view.brightness)
        contrast = rng.uniform(1 - view.contrast, 1 + view.contrast)
        offset = shift + mean * scale * brightness * (1 - contrast)
        # The fastest way in OpenCV to apply one gain and one offset to integers and get floats.
        out = cv2.addWeighted(tile, scale * brightness * contrast, tile, 0, offset, dtype=cv2.CV_32F)
        if view.noise > 0:
            noise = rng.standard_normal(out.shape, np.float32)
            out = out + noise * np.float32(rng.uniform(0, view.noise / self._form.std))
        return out


def draw_homography(view: View, tile_size: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a homography: (3, 3) float64 from destination to source, (0, 0) being the **centre** of the top-left pixel."""
    zoom, slack = tile_size / size / rng.uniform(*view.scale), 0.0
    if view.crop_area is not None:
        kept = math.sqrt(rng.uniform(*view.crop_area))
        zoom, slack = zoom * kept, (1 - kept) * tile_size / 2
    reach = slack + view.translation * tile_size
    flips = [-1 if rng.random() < p else 1 for p in (view.horizontal_flip, view.vertical_flip)]
    angle = math.radians(rng.uniform(-view.rotation_deg, view.rotation_deg))
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    to_centre, centred, back = np.eye(3), np.eye(3), np.eye(3)
    to_centre[:2, 2] = -(size - 1) / 2
    centred[:2, :2] = rotation @ np.diag(np.multiply(flips, zoom))
    centred[2, :2] = rng.uniform(-view.perspective, view.perspective, 2) * 2 / size
    back[:2, 2] = (tile_size - 1) / 2 + rng.uniform(-reach, reach, 2)
    return back @ centred @ to_centre


class TorchvisionViews:
    """Views of a tile with torchvision.transforms.v2, in float32 as its transforms require.

    It does less than our views in two ways: outside the tile is black, and a perspective is resampled a second time, since
    torchvision does not compose transforms.

    Parameters
    ----------
    views
        What may vary in each view.
    form
        Size and normalisation of the views.
    """

    def __init__(self, views: Sequence[View], form: ImageFormat) -> None:
        self._transforms = [_torchvision_view(view, form) for view in views]

    def __call__(self, tile: np.ndarray) -> tuple[torch.Tensor, ...]:
        image = unit_tile(tile)
        return tuple(transform(image) for transform in self._transforms)


def unit_tile(tile: np.ndarray) -> torch.Tensor:
    """Return a tile as a float32 tensor (1, H, W) in [0, 1]."""
    return torch.from_numpy(tile.astype(np.float32))[None].div_(np.iinfo(tile.dtype).max)


def _torchvision_view(view: View, form: ImageFormat) -> Callable[[torch.Tensor], torch.Tensor]:
    from torchvision.transforms import InterpolationMode, v2

    bilinear = InterpolationMode.BILINEAR
    steps: list[Any] = []
    if view.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(view.horizontal_flip))
    if view.vertical_flip:
        steps.append(v2.RandomVerticalFlip(view.vertical_flip))
    if view.rotation_deg or view.translation or view.scale != (1, 1):
        shift = (view.translation, view.translation) if view.translation else None
        steps.append(v2.RandomAffine(view.rotation_deg, translate=shift, scale=view.scale, interpolation=bilinear))
    if view.perspective:
        steps.append(v2.RandomPerspective(view.perspective, p=1, interpolation=bilinear))
    if view.crop_area:
        steps.append(v2.RandomResizedCrop(form.size, view.crop_area, ratio=(1, 1), interpolation=bilinear))
    else:
        steps.append(v2.Resize(form.size, bilinear))  # does nothing at the tile's own size
    if view.brightness or view.contrast:
        steps.append(v2.ColorJitter(brightness=view.brightness, contrast=view.contrast))
    if view.blur_probability:
        window = 2 * math.ceil(3 * view.blur_sigma[1]) + 1
        steps.append(v2.RandomApply([v2.GaussianBlur(window, view.blur_sigma)], view.blur_probability))
    if view.noise:
        steps.append(v2.GaussianNoise(sigma=view.noise / 2, clip=False))
    return v2.Compose([*steps, v2.Normalize([form.mean], [form.std])])


def kornia_view(view: View, form: ImageFormat) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the view as kornia's augmentations of a batch (N, 1, H, W) in [0, 1], on the device that it is on."""
    import kornia.augmentation as K

    steps: list[Any] = []
    if view.horizontal_flip:
        steps.append(K.RandomHorizontalFlip(p=view.horizontal_flip))
    if view.vertical_flip:
        steps.append(K.RandomVerticalFlip(p=view.vertical_flip))
    if view.rotation_deg or view.translation or view.scale != (1, 1):
        shift = (view.translation, view.translation) if view.translation else None
        steps.append(K.RandomAffine(view.rotation_deg, shift, view.scale, padding_mode="reflection", p=1))
    if view.perspective:
        steps.append(K.RandomPerspective(view.perspective, p=1))
    if view.crop_area:
        steps.append(K.RandomResizedCrop((form.size, form.size), view.crop_area, ratio=(1, 1)))
    else:
        steps.append(K.Resize((form.size, form.size)))
    if view.brightness:
        steps.append(K.RandomBrightness((1 - view.brightness, 1 + view.brightness), clip_output=False, p=1))
    if view.contrast:
        steps.append(K.RandomContrast((1 - view.contrast, 1 + view.contrast), clip_output=False, p=1))
    if view.blur_probability:
        window = 2 * math.ceil(3 * view.blur_sigma[1]) + 1
        steps.append(K.RandomGaussianBlur((window, window), view.blur_sigma, p=view.blur_probability))
    if view.noise:
        steps.append(K.RandomGaussianNoise(std=view.noise / 2, p=1))
    steps.append(K.Normalize([form.mean], [form.std]))
    return K.AugmentationSequential(*steps, data_keys=["input"])
