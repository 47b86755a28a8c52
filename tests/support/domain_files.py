"""Small DICOM and PDF files, with what such files have in practice: a patient's data, text, encryption."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

# What may never be in a shard. The values are unlike anything else in it.
PATIENT = {
    "PatientName": "Zweigler^Ottokar",
    "PatientID": "PID-8841773",
    "PatientBirthDate": "19380417",
    "PatientSex": "M",
    "PatientAge": "087Y",
    "PatientAddress": "Quellweg 19",
    "OtherPatientIDs": "OTHER-552",
    "AccessionNumber": "ACC-99031",
    "StudyID": "STUDY-417",
    "StudyDate": "20250131",
    "SeriesDate": "20250131",
    "StudyTime": "101112",
    "InstitutionName": "Sankt Hypothetikum",
    "InstitutionAddress": "Ringallee 3",
    "StationName": "STATION-77",
    "ReferringPhysicianName": "Quark^Ilse",
    "OperatorsName": "Xylander^Bo",
    "DeviceSerialNumber": "SERIAL-4711",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.71",
    "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.72",
    "PatientComments": "lives alone",
    "AdditionalPatientHistory": "smoked until 2001",
}


def write_dicom(path: Path, pixels: np.ndarray, syntax: str = "1.2.840.10008.1.2.1", **tags: Any) -> Path:
    """A file with pixels [h, w], [h, w, 3] or [n, h, w], the tags of PATIENT, and `tags`, of which None is left out."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = "1.2.826.0.1.3680043.8.498.73"
    meta.TransferSyntaxUID = syntax
    dataset = Dataset()
    dataset.file_meta = meta
    colour = pixels.shape[-1] == 3
    shape = pixels.shape[:-1] if colour else pixels.shape
    values: dict[str, Any] = {
        **PATIENT,
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "Modality": "CT",
        "BodyPartExamined": "CHEST",
        "StudyDescription": "thorax without contrast",
        "SamplesPerPixel": 3 if colour else 1,
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "PlanarConfiguration": 0 if colour else None,
        "NumberOfFrames": shape[0] if len(shape) == 3 else None,
        "Rows": shape[-2],
        "Columns": shape[-1],
        "BitsAllocated": 8 * pixels.itemsize,
        "BitsStored": 8 * pixels.itemsize,
        "HighBit": 8 * pixels.itemsize - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        **tags,
    }
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    data = pixels.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OW" if pixels.itemsize > 1 else "OB"
    dataset.add_new(0x00091001, "LO", "PRIVATE-31337")
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def dicom_item(**tags: Any) -> list[Any]:
    """A sequence of one item."""
    from pydicom.dataset import Dataset

    found = Dataset()
    for keyword, value in tags.items():
        setattr(found, keyword, value)
    return [found]


def dicom_table(entries: Iterable[int], first: int = 0, bits: int = 16, as_bytes: bool = False) -> list[Any]:
    """A sequence with a lookup table for values from `first` on, its entries as numbers or as bytes."""
    values = list(entries)
    (found,) = dicom_item(LUTDescriptor=[len(values) % 2**16, first, bits])
    found.add_new("LUTData", "OW" if as_bytes else "US", np.array(values, "<u2").tobytes() if as_bytes else values)
    return [found]


def pdf_of(texts: list[str], compress: bool = True, size: tuple[int, int] = (200, 150), password: str = "") -> bytes:
    """A page for each text, "" for none, with a bar beside it; with a password, encrypted."""
    from reportlab.lib.pdfencrypt import StandardEncryption
    from reportlab.pdfgen.canvas import Canvas

    file = io.BytesIO()
    encryption = StandardEncryption(password) if password else None
    canvas = Canvas(file, pagesize=size, pageCompression=int(compress), invariant=1, encrypt=encryption)
    for number, text in enumerate(texts, 1):
        for line, part in enumerate(text.split("\n")):
            canvas.drawString(20, size[1] - 30 - 15 * line, part)
        canvas.rect(30, 20, 20 * number, 40, fill=1)
        canvas.showPage()
    canvas.save()
    return file.getvalue()
