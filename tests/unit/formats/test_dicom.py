"""Folders of DICOM files: nothing of the patient in a shard, reasons for what is not used, mutated files."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.check import Checked, Reencoding, check
from data_tools.convert import main
from data_tools.formats import dicom
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.errors import ConfigError, DataError
from tests.support.datasets import problems, read, written
from tests.support.domain_files import PATIENT, dicom_item, dicom_table, write_dicom
from tests.support.fuzz_files import corrupted_bytes

pydicom = pytest.importorskip("pydicom", reason="pydicom: DICOM was not checked")

REAL = Path(pydicom.__file__).parent / "data" / "test_files"  # in the package: of scanners, GDCM and DCMTK
RAMP = np.arange(-1000, 1000, 5, dtype=np.int16).reshape(20, 20)
BY_TAGS = ("--text-tags", "Modality", "BodyPartExamined")


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # of values that are no code strings
def test_nothing_of_the_patient_is_in_the_shards(tmp_path):
    study = tmp_path / "study"
    write_dicom(
        study / "ct/1.dcm", RAMP, Laterality="l", ViewPosition="Ottokar's side of the bed", ImageComments="Zweigler"
    )
    write_dicom(study / "cr/2.dcm", RAMP, Modality="CR", ViewPosition="PA", ImageLaterality="R")
    words = ["dicom", "--images", study, *BY_TAGS, "StudyDescription", "--output", tmp_path / "out"]
    assert main([str(word) for word in words]) == 0
    shards = b"".join(path.read_bytes() for path in sorted((tmp_path / "out").iterdir()))
    values = [*PATIENT.values(), "PRIVATE-31337", "1.2.826", "Zweigler", "Ottokar", "bed"]
    assert [value for value in values if value != "M" and value.encode() in shards] == []
    samples = {sample.meta["id"]: sample for sample in iterate_samples(SourceConfig.at(tmp_path / "out"))}
    assert samples["ct/1.dcm"].meta["dicom"] == {"Modality": "CT", "BodyPartExamined": "CHEST"}
    assert samples["cr/2.dcm"].meta["dicom"] == {
        "Modality": "CR", "BodyPartExamined": "CHEST", "ImageLaterality": "R", "ViewPosition": "PA",
    }  # fmt: skip
    assert samples["ct/1.dcm"].text == "CT, CHEST, thorax without contrast"
    assert samples["ct/1.dcm"].meta.keys() == {
        "captions", "content", "dicom", "height", "id", "schema_version", "sha256", "source", "split", "tasks", "width",
    }  # fmt: skip


@pytest.mark.parametrize(("place", "tag"), [
    ("PID-8841773/1.dcm", "PatientID"), ("zweigler_ottokar/1.dcm", "PatientName"), ("x/20250131_2", "StudyDate"),
    ("acc-99031.dcm", "AccessionNumber"),
    ("1.2.826.0.1.3680043.8.498.73.dcm", "SOPInstanceUID"), ("CT.1.2.826.0.1.3680043.8.498.71/1", "StudyInstanceUID"),
])  # fmt: skip
def test_patient_data_in_a_path(tmp_path, place, tag):
    write_dicom(tmp_path / place, RAMP)
    (record,) = read(dicom, "--images", tmp_path, *BY_TAGS)
    assert (
        record.problem.startswith("patient data in path: ")
        and f"the file's {tag} in it; --ids number" in record.problem
    )
    (record,) = read(dicom, "--images", tmp_path, *BY_TAGS, "--ids", "number")
    assert (record.identifier, record.problem) == ("00000000", "")


def test_patient_data_in_a_text(tmp_path):
    for name in ("a", "b", "c", "d"):
        write_dicom(tmp_path / f"{name}.dcm", RAMP, PatientID="12" if name == "d" else "PID-8841773")
    texts = {"a.dcm": "Mr. ZWEIGLER has no effusion", "b.dcm": ["fine", "see pid-8841773"],
             "c.dcm": "Ottokars are birds", "d.dcm": "12 nodules", "e.dcm": "gone"}  # fmt: skip
    captions = written(tmp_path / "captions.json", texts)
    found = read(dicom, "--images", tmp_path, "--captions", captions)
    assert problems(found) == {"a.dcm": "patient data in text", "b.dcm": "patient data in text"}
    write_dicom(tmp_path / "a.dcm", RAMP, PatientName="Unknown^^", ReferringPhysicianName="")
    assert not read(dicom, "--images", tmp_path, "--captions", written(captions, {"a.dcm": "of unknown origin"}))[
        0
    ].problem


def test_identifying_pixels(tmp_path):
    write_dicom(tmp_path / "a.dcm", RAMP, BurnedInAnnotation="YES")
    write_dicom(tmp_path / "b.dcm", RAMP, BurnedInAnnotation="NO", RecognizableVisualFeatures="YES")
    write_dicom(tmp_path / "c.dcm", RAMP, BurnedInAnnotation="NO")
    found = read(dicom, "--images", tmp_path, *BY_TAGS)
    assert problems(found) == dict.fromkeys(("a.dcm", "b.dcm"), "identifying pixels")
    assert "BurnedInAnnotation is YES; --identifying-pixels" in found[0].problem
    assert not problems(read(dicom, "--images", tmp_path, *BY_TAGS, "--identifying-pixels"))


def test_what_is_no_picture_is_counted(tmp_path, capsys):
    study = tmp_path / "study"
    write_dicom(study / "a.dcm", RAMP)
    others = ("reportsi.dcm", "dicomdirtests/DICOMDIR", "MR_truncated.dcm", "JPEGLSNearLossless_08.dcm", "badVR.dcm")
    for name in others:
        shutil.copy(REAL / name, study / Path(name).name)
    written(study / "notes.txt", "no DICOM")
    arguments = ["dicom", "--images", study, *BY_TAGS, "--output", tmp_path / "out", "--max-rejected", 0.9]
    assert main([str(word) for word in arguments]) == 0
    said = capsys.readouterr().out
    assert "wrote 1 samples" in said
    assert "not used: 2 DICOM without a picture (DICOMDIR, reportsi.dcm), 1 no DICOM file" in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = {row["id"]: row["reason"] for row in rows}
    assert reasons == {
        "JPEGLSNearLossless_08.dcm": "missing decoder", "MR_truncated.dcm": "unreadable image",
        "badVR.dcm": "unreadable header",
    }  # fmt: skip
    (missing,) = [row["detail"] for row in rows if row["reason"] == "missing decoder"]
    assert "JPEG-LS Lossy" in missing and "pylibjpeg-libjpeg>=2.1" in missing and "pyjpegls>=1.2" in missing


def test_a_table_names_what_is_used(tmp_path):
    for name in ("x/a.dcm", "x/b.dcm", "c.dcm"):
        write_dicom(tmp_path / name, RAMP)
    written(tmp_path / "d.dcm", "no DICOM")
    table = written(
        tmp_path / "captions.csv", "file,text\nx/./a.dcm,one\nx/a.dcm,two\nc.dcm,one\nd.dcm,none\ngone.dcm,none\n"
    )
    parsed = arguments_of("--images", tmp_path, "--captions", table)
    found = list(dicom.records(parsed))
    assert {record.identifier: record.captions for record in found} == {
        "c.dcm": ["one"], "d.dcm": ["none"], "x/a.dcm": ["one", "two"],
    }  # fmt: skip
    assert problems(found) == {"d.dcm": "no DICOM file"}
    assert (
        dicom.unused(parsed)
        == "captions of 1 others in captions.csv (gone.dcm), 1 without a caption in captions.csv (x/b.dcm)"
    )


def arguments_of(*words):
    parser = argparse.ArgumentParser()
    dicom.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_pictures_of_one_text_are_no_negatives_of_each_other(tmp_path):
    for name, part in (("a", "CHEST"), ("b", "CHEST"), ("c", "SKULL")):
        write_dicom(tmp_path / f"{name}.dcm", RAMP, BodyPartExamined=part)
    one, two, three = (record.meta["content"] for record in read(dicom, "--images", tmp_path, *BY_TAGS))
    assert one == two != three


@pytest.mark.parametrize(("words", "message"), [
    (("--images", "{}/gone", *BY_TAGS), "gone: no such folder"),
    (("--images", "{}/empty", *BY_TAGS), "empty: no DICOM file with a picture is there, but nothing"),
    (("--images", "{}", "--captions", "{}/gone.csv"), "gone.csv: No such file"),
    (("--images", "{}", "--captions", "{}/other.csv"), r"names 'zzz', and the data has nothing .* such as 'a.dcm'"),
    (("--images", "{}", *BY_TAGS, "--window", "40", "0"), "--window 40 0: give a centre, and a width of at least 1"),
    (("--images", "{}", *BY_TAGS, "--window", "nan", "9"), "--window nan 9: give a centre"),
])  # fmt: skip
def test_errors_of_users(tmp_path, words, message):
    write_dicom(tmp_path / "a.dcm", RAMP)
    (tmp_path / "empty").mkdir()
    written(tmp_path / "other.csv", "file,text\nzzz,none\n")
    with pytest.raises((DataError, ConfigError), match=message):
        read(dicom, *(word.replace("{}", str(tmp_path)) for word in words))


def test_a_tag_that_names_a_patient_is_no_caption(tmp_path, capsys):
    with pytest.raises(SystemExit):
        read(dicom, "--images", tmp_path, "--text-tags", "PatientName")
    assert "invalid choice: 'PatientName'" in capsys.readouterr().err


def test_without_pydicom(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ConfigError, match=r"^the format dicom needs pydicom: pip install 'dsmoe-vl\[medicine\]'$"):
        read(dicom, "--images", tmp_path, *BY_TAGS)


def test_one_process_and_two_give_the_same_bytes(tmp_path):
    study = tmp_path / "study"
    rng = np.random.default_rng(4)
    for n in range(3):
        write_dicom(study / f"{n}.dcm", rng.integers(0, 4096, (20, 24), dtype=np.uint16))
        write_dicom(study / f"{n}.cine", rng.integers(0, 256, (4, 16, 24, 3), dtype=np.uint8))
    shutil.copy(REAL / "MR_truncated.dcm", study)
    for workers in (1, 2):
        words = ["dicom", "--images", study, *BY_TAGS, "--output", tmp_path / str(workers), "--workers", workers,
                 "--samples-per-shard", 2, "--max-rejected", 0.5]  # fmt: skip
        assert main([str(word) for word in words]) == 0
    one, two = ({p.name: p.read_bytes() for p in sorted((tmp_path / n).iterdir())} for n in "12")
    assert one == two and len([name for name in one if name.endswith(".tar")]) == 3
    assert [sample.media_type for sample in iterate_samples(SourceConfig.at(tmp_path / "1"))] == ["mkv", "png"] * 3


def all_of(parsed, folder):
    """The records, or none if nothing is left that is DICOM."""
    try:
        return list(dicom.records(parsed))
    except DataError as error:
        assert str(error).startswith(f"--images {folder}: no DICOM file with a picture is there, but 1 ")
        return []


def test_mutated_files(tmp_path):
    """Samples or reasons, in one line each."""
    small = np.random.default_rng(6).integers(0, 4096, (12, 10), dtype=np.uint16)
    own = write_dicom(
        tmp_path / "made" / "a.dcm", np.stack([small] * 2), WindowCenter=9, WindowWidth=40, PixelSpacing=[1.0, 2.0],
        VOILUTSequence=dicom_table(range(64), 3, 16),
        SharedFunctionalGroupsSequence=dicom_item(PixelMeasuresSequence=dicom_item(PixelSpacing=[1, 1])),
    )  # fmt: skip
    names = ["MR_small_RLE.dcm", "SC_rgb_small_odd.dcm", "SC_rgb_small_odd_jpeg.dcm",
             "MR_small_jp2klossless.dcm", "dicomdirtests/98892001/CT5N/2062"]  # fmt: skip
    sources = [own.read_bytes(), *((REAL / name).read_bytes() for name in names)]
    rng = np.random.default_rng(9)
    folder = tmp_path / "mutated"
    folder.mkdir()
    whole = refused = 0
    for number in range(1000):
        content = sources[number % len(sources)]
        if number % 3:
            content = corrupted_bytes(rng, content)
        else:  # in the tags
            changed = bytearray(content)
            for place in rng.integers(132, min(len(changed), 2500), 3):
                changed[place] = int(rng.integers(256))
            content = bytes(changed)
        (folder / "a.dcm").write_bytes(content)
        parsed = arguments_of("--images", folder, "--text-tags", "Modality", "SeriesDescription")
        for record in all_of(parsed, folder):
            found = check(record, "dicom", Reencoding())
            if isinstance(found, Checked):
                whole += 1
                json.dumps(found.meta, allow_nan=False)
            else:
                refused += 1
                assert found.reason and found.detail and "\n" not in found.detail
                assert "Traceback" not in found.detail
    assert whole > 300 and refused > 100
