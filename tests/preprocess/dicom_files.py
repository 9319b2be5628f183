"""Writes small DICOM films as scanners and archives write them."""

from __future__ import annotations

import imagecodecs
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, RLELossless, generate_uid

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def write_dicom(
    path, pixels, bits=12, photometric="MONOCHROME2", rle=False, syntax=ExplicitVRLittleEndian, frames=None, **elements
):
    """Write a DICOM film: `pixels` as they are stored, or the codestreams in `frames`."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.Modality = "MG"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = photometric
    for name, value in elements.items():
        setattr(dataset, name, value)
    if frames is not None:
        dataset.PixelData = encapsulate([bytes(f) for f in frames])
    else:
        if syntax == ExplicitVRBigEndian:
            pixels = pixels.astype(pixels.dtype.newbyteorder(">"))
        data = pixels.tobytes()
        dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if frames is not None or pixels.dtype.itemsize == 1 else "OW"
    if rle:
        dataset.compress(RLELossless)
    dataset.save_as(path, enforce_file_format=True)
    return path


def jpeg2000(pixels, bits, **options):
    return imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", bitspersample=bits, **{"reversible": True} | options)
