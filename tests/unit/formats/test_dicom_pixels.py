"""The pictures of DICOM files: grey levels as the standard and pydicom have them, colours, frames, square pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.check import Reencoding, check
from data_tools.formats import dicom
from data_tools.formats.dicom_pixels import Picture
from dsmoe_vl.data.decode import decode_video
from dsmoe_vl.errors import DataError
from tests.support.datasets import read
from tests.support.domain_files import dicom_item as item
from tests.support.domain_files import dicom_table as table
from tests.support.domain_files import write_dicom

pydicom = pytest.importorskip("pydicom", reason="pydicom: DICOM was not checked")
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array  # noqa: E402

REAL = Path(pydicom.__file__).parent / "data" / "test_files"  # in the package: of scanners, GDCM and DCMTK
RAMP = np.arange(-1000, 1000, 5, dtype=np.int16).reshape(20, 20)


def picture(path, window=None):
    return np.asarray(Image.open(io.BytesIO(Picture(path, window).read_bytes())))


def shown(folder, pixels=RAMP, **tags):
    return picture(write_dicom(folder / "a.dcm", pixels, **tags)).astype(int)


def in_window(values, centre, width):
    """PS3.3 C.11.2.1.2.1, value by value."""
    grey = []
    for value in values.ravel().tolist():
        if value <= centre - 0.5 - (width - 1) / 2:
            grey.append(0.0)
        elif value > centre - 0.5 + (width - 1) / 2:
            grey.append(255.0)
        else:
            grey.append(((value - (centre - 0.5)) / (width - 1) + 0.5) * 255)
    return np.rint(grey).astype(int).reshape(values.shape)


def test_windows_are_those_of_the_standard(tmp_path):
    tags = {"WindowCenter": [-40.0, 9], "WindowWidth": [400.0, 9], "RescaleSlope": 2, "RescaleIntercept": -100}
    np.testing.assert_array_equal(shown(tmp_path, **tags), in_window(2 * RAMP.astype(float) - 100, -40, 400))
    found = picture(tmp_path / "a.dcm", (-600.0, 1500.0))
    np.testing.assert_array_equal(found, in_window(2 * RAMP.astype(float) - 100, -600, 1500))
    assert picture(tmp_path / "a.dcm", (3.0, 1.0)).tolist() == np.where(2 * RAMP - 100 <= 2.5, 0, 255).tolist()


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_are_those_of_pydicom(tmp_path, function):
    tags = {"WindowCenter": 40, "WindowWidth": 350, "VOILUTFunction": function}
    found = shown(tmp_path, **tags)
    theirs = apply_voi_lut(RAMP, pydicom.dcmread(tmp_path / "a.dcm"))
    theirs = (theirs - -(2**15)) * 255 / (2**16 - 1)
    assert np.abs(found - theirs).max() <= 1 and found.min() < 5 and found.max() > 250


def test_without_a_window_all_values_are_shown(tmp_path):
    expected = np.rint((RAMP.astype(float) + 1000) / 1995 * 255)
    assert np.abs(shown(tmp_path) - expected).max() <= 1
    assert np.abs(shown(tmp_path, WindowCenter=0, WindowWidth=0) - expected).max() <= 1  # no window at all
    assert np.abs(shown(tmp_path, PhotometricInterpretation="MONOCHROME1") - (255 - expected)).max() <= 1
    assert np.abs(shown(tmp_path, PresentationLUTShape="INVERSE") - (255 - expected)).max() <= 1
    assert set(np.unique(shown(tmp_path, np.full((4, 4), 7, np.uint16)))) <= {0, 127, 128}


def test_values_beyond_numbers_are_black(tmp_path):
    found = shown(tmp_path, RescaleSlope="1e307", RescaleIntercept=0)
    assert found[0, 0] == found[-1, -1] == 0


def test_what_is_installed_is_not_enough():
    with pytest.raises(DataError, match=r"12-bit precision; others may, .*pylibjpeg-libjpeg>=2.1$"):
        Picture(REAL / "JPGExtended.dcm").read_bytes()


def test_padding_is_black_and_takes_no_part(tmp_path):
    pixels = np.full((6, 6), 100, np.int16)
    pixels[0], pixels[1] = -2000, 200
    found = shown(tmp_path, pixels, PixelPaddingValue=-2000, PhotometricInterpretation="MONOCHROME1")
    assert (found[0] == 0).all() and (found[1] == 0).all() and (found[2:] == 255).all()
    found = shown(tmp_path, pixels, PixelPaddingValue=-2000, PixelPaddingRangeLimit=150)
    assert (found[0] == 0).all() and (found[2:] == 0).all()


def test_lookup_tables(tmp_path):
    """Of 16 bits as pydicom has them; and of 8 bits with more than 256 entries, value by value."""
    pixels = np.arange(0, 4000, 10, dtype=np.uint16).reshape(20, 20)
    curve = (np.linspace(0, 1, 4096) ** 2 * 65535).astype(int).tolist()
    tags = {"BitsStored": 12, "HighBit": 11}
    found = shown(tmp_path, pixels, **tags, VOILUTSequence=table(curve, 0), WindowCenter=1, WindowWidth=2)
    theirs = apply_voi_lut(pixels, pydicom.dcmread(tmp_path / "a.dcm"))
    assert np.abs(found - theirs / 65535 * 255).max() <= 1
    found = shown(tmp_path, pixels, **tags, VOILUTSequence=table([n // 16 for n in range(4096)], 100, 8, True))
    np.testing.assert_array_equal(found, np.clip(pixels.astype(int) - 100, 0, 4095) // 16)
    found = shown(
        tmp_path, pixels, **tags, ModalityLUTSequence=table(curve[::-1], 0), WindowCenter=9e3, WindowWidth=1e4
    )
    values = apply_modality_lut(pixels, pydicom.dcmread(tmp_path / "a.dcm")).astype(float)
    np.testing.assert_array_equal(found, in_window(values, 9e3, 1e4))


def test_frames_have_settings_of_their_own_and_become_a_video_without_loss(tmp_path):
    pixels = np.random.default_rng(3).integers(0, 4096, (5, 15, 17), dtype=np.uint16)
    frames = [
        item(
            PixelValueTransformationSequence=item(RescaleSlope=n + 1, RescaleIntercept=-n, RescaleType="US"),
            FrameVOILUTSequence=item(WindowCenter=2000 * (n + 1), WindowWidth=1000 * (n + 1)),
        )[0]
        for n in range(5)
    ]
    path = write_dicom(tmp_path / "a.dcm", pixels, PerFrameFunctionalGroupsSequence=frames, FrameTime=40)
    (record,) = read(dicom, "--images", tmp_path, "--text-tags", "Modality")
    found = check(record, "dicom", Reencoding())
    assert record.kind == "video" and found.media_type == "mkv" and not found.notes
    assert (found.meta["fps"], found.meta["duration_seconds"], found.meta["tasks"]) == (
        25.0,
        0.2,
        ["caption", "retrieval"],
    )
    decoded = decode_video(found.media, 5)
    assert [round(second, 2) for second, _ in decoded] == [0.0, 0.04, 0.08, 0.12, 0.16]
    for n, (_, frame) in enumerate(decoded):
        expected = in_window(pixels[n].astype(float) * (n + 1) - n, 2000 * (n + 1), 1000 * (n + 1))
        np.testing.assert_array_equal(frame, np.repeat(expected[..., None], 3, 2))
    assert Picture(path).read_bytes() == found.media
    write_dicom(path, pixels)  # no window: of all frames the same
    lowest, highest = (int(edge) for edge in (pixels.min(), pixels.max()))
    for n, (_, frame) in enumerate(decode_video(Picture(path).read_bytes(), 5)):
        assert np.abs(frame[..., 0] - (pixels[n].astype(float) - lowest) / (highest - lowest) * 255).max() <= 1


def test_pixels_are_made_square(tmp_path):
    assert shown(tmp_path, PixelSpacing=[2.0, 0.5]).shape == (80, 20)
    assert shown(tmp_path, PixelAspectRatio=[1, 2], PixelSpacing=[1.0, 1.0]).shape == (20, 40)
    assert shown(tmp_path, PixelSpacing=[50.0, 0.5]).shape == (20, 20)  # damage


@pytest.mark.parametrize("name", [
    "SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_dcmtk_+eb+cy+n1.dcm", "SC_rgb_rle.dcm", "SC_rgb_jpeg_dcmtk.dcm",
    "SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm", "SC_ybr_full_422_uncompressed.dcm", "SC_rgb_small_odd.dcm",
    "examples_jpeg2k.dcm",
])  # fmt: skip
def test_colours_of_real_files(name):
    theirs = pixel_array(REAL / name).astype(float)
    bits = pydicom.dcmread(REAL / name, stop_before_pixels=True).BitsStored
    assert np.abs(picture(REAL / name) - theirs / (2**bits - 1) * 255).max() <= 1


@pytest.mark.parametrize("name", [
    "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_bigendian.dcm", "JPEG2000.dcm",
    "J2K_pixelrep_mismatch.dcm", "examples_palette.dcm",
])  # fmt: skip
def test_real_files_say_nothing_on_the_terminal(name, capfd):
    found = picture(REAL / name)
    assert found.dtype == np.uint8 and found.std() > 5
    if name.startswith("MR"):  # the same picture in several transfer syntaxes
        np.testing.assert_array_equal(found, picture(REAL / "MR_small.dcm"))
    assert capfd.readouterr() == ("", "")
