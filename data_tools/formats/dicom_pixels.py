"""The picture of a DICOM file as its maker wants it shown, in 8 bits: the grey levels of DICOM PS3.3, C.11 and C.7.6.3.

Shapes: h rows, w columns; a grey frame is [h, w], a colour frame [h, w, 3].
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import av
import numpy as np
from PIL import Image

from data_tools.formats import Rendered
from dsmoe_vl.data.decode import check_pixels
from dsmoe_vl.errors import ConfigError, DataError
from dsmoe_vl.files import require_regular

INSTALL = "pip install 'dsmoe-vl[medicine]'"
_MOST_STRETCHED = 8.0  # a larger ratio of a pixel's sides is damage and ignored, as in videos
_SLICES_PER_SECOND = 1  # of frames that are no times, such as the slices of a volume
# Where enhanced objects have what others have at their top: macros of the functional groups.
_MACROS = ("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence")


@dataclass(frozen=True)
class Picture(Rendered):
    """What a DICOM file shows: a PNG, of several frames a video without loss, FFV1 in Matroska.

    `window`: centre and width of the grey levels that are shown, in units after the modality LUT such as Hounsfield's;
    None: those of the file.
    """

    window: tuple[float, float] | None = None

    def read_bytes(self) -> bytes:
        """See `Rendered`. Raises DataError if the pixels cannot be decoded."""
        pydicom = imported()
        dataset: Any = None
        try:
            with quiet():
                dataset = pydicom.dcmread(require_regular(self.path))
                frames = shown(dataset, self.window)
                if number_of_frames(dataset) > 1:
                    return _video(frames, _frames_per_second(dataset))
                file = io.BytesIO()
                Image.fromarray(next(frames)).save(file, "PNG")
                return file.getvalue()
        except (OSError, DataError):
            raise
        except Exception as error:  # pydicom and its plugins raise anything for malformed files
            others = _other_decoders(dataset) if isinstance(error, RuntimeError) else ""
            raise DataError(f"DICOM cannot be decoded: {in_one_line(error)}{others}") from error


def imported() -> Any:
    """pydicom. Raises ConfigError if it is missing."""
    try:
        import pydicom
    except ImportError as error:
        raise ConfigError(f"the format dicom needs pydicom: {INSTALL}") from error
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom


@contextmanager
def quiet() -> Iterator[None]:
    """In the block, pydicom says nothing of odd values on the terminal: they may be a patient's."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_one_line(error: BaseException) -> str:
    """What an error says, at most 300 characters; pydicom puts tracebacks into messages, which are left out."""
    said = str(error).partition("Traceback (most recent call last)")[0]
    return (" ".join(said.split()) or type(error).__name__)[:300]


def missing_decoder(syntax: str) -> str:
    """What is missing for pixels of a transfer syntax, given as its UID; "" if nothing is."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    uid = UID(syntax)
    name = f"{uid.name} ({uid})" if uid.name != uid else repr(syntax)
    try:
        decoder = get_decoder(uid)
    except NotImplementedError:
        return f"pydicom has no decoder of {name}: take the pixels out with a tool that has one, such as dcmtk"
    if decoder.is_available:
        return ""
    return f"{name} is decoded by packages that are not installed, one of: {'; '.join(decoder.missing_dependencies)}"


def _other_decoders(dataset: Any) -> str:
    """Packages that may decode what those that are installed could not; "" without any."""
    from pydicom.pixels import get_decoder

    try:
        missing = get_decoder(dataset.file_meta.TransferSyntaxUID).missing_dependencies
    except Exception:  # as above
        return ""
    return f"; others may, which are not installed: {'; '.join(missing)}" if missing else ""


def number_of_frames(dataset: Any) -> int:
    """At least 1. Raises ValueError."""
    return max(1, int(dataset.get("NumberOfFrames") or 1))


def shown(dataset: Any, window: tuple[float, float] | None) -> Iterator[np.ndarray]:
    """The frames as they are shown: uint8 [h, w] or [h, w, 3], with square pixels. Raises anything."""
    check_pixels(int(dataset.Columns), int(dataset.Rows))
    limits: tuple[float, float] | None = None
    for number, stored in enumerate(_stored(dataset)):
        facts = _Facts(dataset, number)
        if stored.ndim == 3 or dataset.PhotometricInterpretation == "PALETTE COLOR":
            yield _square(_coloured(stored, dataset), facts)
            continue
        values, visible = _modality_values(stored, facts)
        grey = _grey(values, facts, window)
        if grey is None:  # the file says nothing: all values, of all frames alike
            if limits is None:
                several = number_of_frames(dataset) > 1
                limits = _limits(dataset) if several else _least_and_most([(values, visible)])
            grey = _windowed(values, (limits[0] + limits[1]) / 2, limits[1] - limits[0] or 1.0, "LINEAR_EXACT")
        if dataset.PhotometricInterpretation == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
            grey = 255 - grey
        grey[~visible] = 0
        yield _square(np.rint(np.clip(np.nan_to_num(grey), 0, 255)).astype(np.uint8), facts)


def _stored(dataset: Any) -> Iterator[np.ndarray]:
    """The frames as they are stored, one after another: grey levels or indices of a palette [h, w], or RGB [h, w, 3].

    pydicom's `iter_pixels` would do the same, but fails where it must correct the sign of JPEG 2000.
    """
    from pydicom.pixels import pixel_array

    for number in range(number_of_frames(dataset)):
        yield pixel_array(dataset, index=number)


class _Facts:
    """What a file says of one frame: the frame's own functional groups count before the shared ones and the top."""

    def __init__(self, dataset: Any, frame: int) -> None:
        shared, own = (dataset.get(f"{name}FunctionalGroupsSequence") or [] for name in ("Shared", "PerFrame"))
        groups = [*own[frame : frame + 1], *shared[:1]]
        macros = [group.get(name) or [] for group in groups for name in _MACROS]
        self._places = [*chain.from_iterable(items[:1] for items in macros), dataset]
        self.is_little_endian = bool(dataset.original_encoding[1])

    def get(self, keyword: str) -> Any:
        """The value of a tag; None without one."""
        found = (place.get(keyword) for place in self._places)
        return next((value for value in found if value is not None and value != ""), None)

    def number(self, keyword: str, index: int = 0) -> float | None:
        """The value of a tag, or one of its values, if it is a finite number."""
        value = self.get(keyword)
        try:
            several = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            number = float(several[index])
        except (TypeError, ValueError, IndexError):
            return None
        return number if math.isfinite(number) else None


def _modality_values(stored: np.ndarray, facts: _Facts) -> tuple[np.ndarray, np.ndarray]:
    """Stored values [h, w] as values of the modality, such as Hounsfield units, float64; and which are no padding."""
    stored = stored.astype(np.float64)
    visible = np.isfinite(stored)
    padding = facts.number("PixelPaddingValue")
    if padding is not None:
        limit = facts.number("PixelPaddingRangeLimit")
        low, high = sorted((padding, padding if limit is None else limit))
        visible &= (stored < low) | (stored > high)
    stored = np.nan_to_num(stored)
    if table := facts.get("ModalityLUTSequence"):
        return _looked_up(stored, table[0], facts)[0], visible
    slope, intercept = facts.number("RescaleSlope"), facts.number("RescaleIntercept")
    values = stored * (1.0 if slope is None else slope) + (intercept or 0.0)
    return np.nan_to_num(values, posinf=0.0, neginf=0.0), visible & np.isfinite(values)


def _grey(values: np.ndarray, facts: _Facts, window: tuple[float, float] | None) -> np.ndarray | None:
    """`values` [h, w] as grey levels from 0 to 255: by `window`, or the VOI LUT or first window of the file; None: it
    has neither."""
    if window:
        return _windowed(values, *window, "LINEAR")
    if table := facts.get("VOILUTSequence"):
        found, bits = _looked_up(values, table[0], facts)
        return found * (255 / (2**bits - 1))
    centre, width = facts.number("WindowCenter"), facts.number("WindowWidth")
    function = str(facts.get("VOILUTFunction") or "LINEAR").upper()
    if centre is None or width is None or width < (1 if function == "LINEAR" else 1e-9):
        return None
    return _windowed(values, centre, width, function)


def _windowed(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Grey levels from 0 to 255 by a window. Raises ValueError for an unknown `function`."""
    from pydicom import Dataset
    from pydicom.pixels import apply_windowing

    view = Dataset()
    view.PhotometricInterpretation, view.BitsStored, view.PixelRepresentation = "MONOCHROME2", 8, 0  # from 0 to 255
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        # In pydicom's own number class, which rounds to 16 characters, narrow windows of large values would vanish.
        for keyword, value in (("WindowCenter", centre), ("WindowWidth", width)):
            view.add_new(keyword, "FD", value)
        view.VOILUTFunction = function
        return np.asarray(apply_windowing(values, view), dtype=np.float64)


def _looked_up(values: np.ndarray, item: Any, facts: _Facts) -> tuple[np.ndarray, int]:
    """Values [h, w] by a lookup table, float64, and the bits of its entries.

    pydicom's own function has the type of the entries for places in the table, of which 8 bits cannot name 257.
    """
    count, first, bits = (int(value) for value in item.LUTDescriptor)
    if not 1 <= bits <= 16:
        raise ValueError(f"a lookup table of {bits} bits")
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if facts.is_little_endian else ">"
        count = count or 2**16
        data = np.frombuffer(data, f"{order}u2" if len(data) >= 2 * count else np.uint8)
    entries = np.atleast_1d(np.asarray(data, dtype=np.float64))[: count or 2**16]
    places = np.clip(np.floor(values) - first, 0, len(entries) - 1)
    return entries[places.astype(np.int64)], bits


def _limits(dataset: Any) -> tuple[float, float]:
    """The least and the most value of all frames."""
    pairs = (_modality_values(frame, _Facts(dataset, number)) for number, frame in enumerate(_stored(dataset)))
    return _least_and_most(pairs)


def _least_and_most(pairs: Any) -> tuple[float, float]:
    """Of values [h, w] that are visible, of pairs of both; (0, 0) without any."""
    found = [(float(seen.min()), float(seen.max())) for values, visible in pairs if (seen := values[visible]).size]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else (0.0, 0.0)


def _coloured(stored: np.ndarray, dataset: Any) -> np.ndarray:
    """RGB in 8 bits: uint8 [h, w, 3]."""
    from pydicom.pixels import apply_color_lut

    bits = int(dataset.BitsStored)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        bits = 8 * stored.dtype.itemsize
    return np.rint(np.clip(stored[..., :3] * (255 / (2**bits - 1)), 0, 255)).astype(np.uint8)


def _square(pixels: np.ndarray, facts: _Facts) -> np.ndarray:
    """`pixels` stretched, to the larger size, until their own height and width are equal."""
    ratio = 1.0
    for keyword in ("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing"):
        down, across = facts.number(keyword), facts.number(keyword, 1)
        if down and across and 1 / _MOST_STRETCHED <= down / across <= _MOST_STRETCHED:
            ratio = down / across
            break
    height, width = pixels.shape[:2]
    size = round(width * max(1.0, 1 / ratio)), round(height * max(1.0, ratio))
    if size == (width, height):
        return pixels
    check_pixels(*size)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _frames_per_second(dataset: Any) -> int:
    facts = _Facts(dataset, 0)
    frame_time = facts.number("FrameTime")  # milliseconds
    rate = 1000 / frame_time if frame_time else facts.number("CineRate") or facts.number("RecommendedDisplayFrameRate")
    return min(max(round(rate or _SLICES_PER_SECOND), 1), 240)


def _video(frames: Iterator[np.ndarray], rate: int) -> bytes:
    """FFV1 in Matroska. The same frames give the same bytes."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.thread_count = 1  # the output depends on the number of threads
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for number, pixels in enumerate(frames):
            colour = pixels.ndim == 3
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24" if colour else "gray")
            if not number:
                stream.height, stream.width = pixels.shape[:2]
                stream.pix_fmt = "bgr0" if colour else "gray"
            frame.pts = number
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())
    return file.getvalue()
