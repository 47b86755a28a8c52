"""MXNet's RecordIO: payloads arrive with their bytes, damage costs what it damages, captions by index or path."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from data_tools.check import Reencoding, check
from data_tools.convert import main
from data_tools.formats import mxnet_records, recordio
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.errors import DataError
from tests.support.datasets import problems, read, written
from tests.support.recordio import MAGIC, in_mxnet, parts, record, write_records
from tests.support.tars import encoded_as

RNG = np.random.default_rng(5)
IMAGES = [
    encoded_as(Image.fromarray(RNG.integers(0, 256, (24 + n, 32, 3), dtype=np.uint8)), ("JPEG", "PNG")[n % 2])
    for n in range(6)
]
TABLE = "index,text\n" + "".join(f"{number},picture {number}\n" for number in range(10, 16))


@pytest.fixture
def data(tmp_path):
    """A .rec file with its .idx and a table of captions."""
    written(tmp_path / "captions.csv", TABLE)
    return write_records(tmp_path / "train.rec", IMAGES)


def captioned(path, name="captions.csv"):
    return read(recordio, "--rec", path, "--captions", path.parent / name)


def test_payloads_are_byte_ranges(data):
    found = captioned(data)
    assert [record.media.read_bytes() for record in found] == IMAGES
    assert [record.captions for record in found] == [[f"picture {number}"] for number in range(10, 16)]
    assert [record.meta["recordio"]["label"] for record in found[:2]] == [(1.0, 10.0, 0.5), 2.0]
    assert not problems(found)


def test_a_payload_with_the_magic_number_is_several_parts(tmp_path):
    payloads = [
        MAGIC,
        b"abcd" + MAGIC + b"efgh",
        MAGIC * 3,
        b"a" + MAGIC + b"bcd" + MAGIC,
        b"xyz",
        b"1234" + MAGIC + b"56",
    ]
    path = tmp_path / "a.rec"
    path.write_bytes(b"".join(record(payload, n) for n, payload in enumerate(payloads)))
    found = list(mxnet_records.read_records(path))
    assert [entry.payload.read_bytes() for entry in found] == payloads
    assert [entry.payload.read_bytes(6) for entry in found] == [payload[:6] for payload in payloads]
    assert [len(entry.payload.parts) for entry in found] == [2, 2, 4, 2, 1, 2]
    assert [entry.number for entry in found] == list(range(6))


def test_labels_with_the_magic_number(tmp_path):
    path = tmp_path / "a.rec"
    (label,) = np.frombuffer(MAGIC, "<f4").tolist()
    path.write_bytes(record(b"payload", 3, [1.0, label, float("nan")]))
    (entry,) = mxnet_records.read_records(path)
    assert entry.payload.read_bytes() == b"payload" and entry.labels == (1.0, label, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.json", {"11": "a dog", "cats/a.jpg": ["a cat", "the cat"], "99": "none"}),
        ("captions.tsv", "file\ttext\ncats/./a.jpg\ta cat\ncats/a.jpg\tthe cat\nb.jpg\ta dog\nc.jpg\tnone\n"),
        ("captions.jsonl", '{"index": 10, "text": "a cat"}\n{"index": 10.0, "text": "the cat"}\n'
                           '{"index": "11", "text": "a dog"}\n{"index": 99, "text": "none"}'),
    ],
)  # fmt: skip
def test_captions_by_index_and_by_path(tmp_path, name, content, capsys):
    path = write_records(tmp_path / "t.rec", IMAGES[:2])
    written(tmp_path / "t.lst", "10\t0.0\tcats/a.jpg\n11\t1\tb.jpg\n")
    written(tmp_path / name, content)
    found = captioned(path, name)
    assert [record.captions for record in found] == [["a cat", "the cat"], ["a dog"]]
    assert main(arguments(path, tmp_path / "out", captions=tmp_path / name)) == 0
    assert f"not used: captions of 1 others in {name}" in capsys.readouterr().out


def test_captions_in_the_list(tmp_path):
    path = write_records(tmp_path / "t.rec", IMAGES[:2], with_index=False)
    written(tmp_path / "t.lst", "10\t3\ta cat\tthe cat\ta.jpg\n011\t1.5\tb.jpg\n")
    assert [record.captions for record in read(recordio, "--rec", path)] == [["a cat", "the cat"], []]
    written(tmp_path / "t.lst", "10\t3\ta.jpg\n11\t1.5\tb.jpg\n")
    with pytest.raises(DataError, match=r"t.rec: no captions: .*--captions"):
        read(recordio, "--rec", path)


def test_damage_costs_the_damaged_records(data):
    whole = captioned(data)
    content = bytearray(data.read_bytes())
    begin = whole[1].media.offset
    content[begin + 4] ^= 8  # of its size
    content[whole[3].media.offset] ^= 1  # of its magic number
    data.write_bytes(content[:-20])
    found = captioned(data)
    assert [one.identifier for one in found if not one.problem] == ["10", "12", "14"]
    told = problems(found)
    assert list(told.values()) == ["damaged record"] * 3 and all("byte" in name for name in told)
    assert f"{data}, byte {begin}: no record begins at byte" in found[1].problem
    assert [one.media.read_bytes() for one in found if not one.problem] == IMAGES[::2]
    data.with_suffix(".idx").unlink()  # whose size is wrong, the second's or the third's, is not known then
    assert [one.identifier for one in captioned(data) if not one.problem] == ["10", "14"]


def test_an_index_of_another_file(data):
    data.with_suffix(".idx").write_text("10\t0\n77\t12\n")
    found = captioned(data)
    assert [one.identifier for one in found] == ["10", f"{data} key 77"]
    assert found[1].problem.startswith("no record: ") and "'77' at byte 12, where none begins" in found[1].problem


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.rec", b"", r"train.rec: byte 0 is not the beginning"),
        ("train.rec", b"\x89PNG", r"train.rec: byte 0 is not the beginning"),
        ("train.idx", b"1\t2\n7 9\n", r"train.idx, line 2: '7 9' is not a key.*rec2idx"),
        ("train.idx", b"1\t8\n2\t8\n", r"line 2: '1' and '2' are both at byte 8"),
        ("train.lst", b"a\t0\tb.jpg\n", r"train.lst, line 1: .* is not an index, labels and a path"),
        ("train.lst", b"1\t0\tb.jpg\n01\t0\tc.jpg\n", r"line 2: the index 1 occurs twice"),
        ("captions.csv", b"text,id\na,b\n", r"captions.csv, line 2: neither 'index' nor 'file' among text, id"),
        ("captions.csv", b"index,file,text\n,,a\n", r"line 2: no value in 'index' and 'file'"),
        ("captions.csv", b"index\n1\n", r"captions.csv, line 2: no 'text'"),
        ("captions.csv", b"index,text\nx.jpg,a\n", r"names 'x.jpg', and the data has nothing .* such as '15'"),
        ("captions.json", b"[]", r"captions.json: an object with captions"),
        ("captions.json", b'{"images": [{}]}', r"'images': \{\} is not a text: .*`coco`"),
    ],
)
def test_files_that_cannot_be_used(data, file, content, message):
    (data.parent / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        captioned(data, file if file.startswith("captions") else "captions.csv")


def test_records_that_the_index_does_not_name(data, capsys):
    data.with_suffix(".idx").write_text("".join(data.with_suffix(".idx").read_text().splitlines(True)[:4]))
    written(data.parent / "captions.csv", "".join(TABLE.splitlines(True)[:5]))
    assert main(arguments(data, data.parent / "out")) == 0
    said = capsys.readouterr().out
    assert "wrote 4 samples" in said and "not used: 2 records of train.rec that its .idx does not name" in said


def arguments(path, output, workers=1, captions=None):
    captions = captions or path.parent / "captions.csv"
    words = ["recordio", "--rec", path, "--captions", captions, "--output", output, "--workers", workers]
    return [str(word) for word in [*words, "--max-rejected", 0.5, "--samples-per-shard", 2]]


def test_one_process_and_two_give_the_same_bytes(data, tmp_path):
    data.write_bytes(data.read_bytes() + parts(b"short") + MAGIC)
    for workers in (1, 2):
        assert main(arguments(data, tmp_path / str(workers), workers)) == 0
    one, two = ({p.name: p.read_bytes() for p in sorted((tmp_path / n).iterdir())} for n in "12")
    assert one == two and len([name for name in one if name.endswith(".tar")]) == 3
    samples = list(iterate_samples(SourceConfig.at(tmp_path / "1")))
    assert [sample.media for sample in samples] == IMAGES
    assert samples[1].meta["recordio"] == {"file": None, "label": 2.0}


def test_mutated_files(tmp_path):
    """Records or reasons, and never the bytes of two records as one."""
    path = write_records(tmp_path / "t.rec", [*IMAGES[:3], b"1234" + MAGIC + b"5678" + MAGIC])
    written(tmp_path / "t.lst", "".join(f"{n}\t1\ta cat\tp{n}.jpg\n" for n in range(10, 14)))
    written(tmp_path / "captions.csv", TABLE)
    files = [path, path, path, path.with_suffix(".idx"), path.with_suffix(".lst"), tmp_path / "captions.csv"]
    sound = {file: file.read_bytes() for file in files}
    heads = [entry.offset for entry in mxnet_records.read_records(path)]
    rng = np.random.default_rng(3)
    whole = refused = 0
    for number in range(1000):
        file = files[number % len(files)]
        content = bytearray(sound[file])
        for _ in range(int(rng.integers(1, 4))):
            near = heads[int(rng.integers(len(heads)))] + int(rng.integers(40))
            place = near if file is path and rng.random() < 0.7 else int(rng.integers(len(content)))
            match int(rng.integers(4)):
                case 0:
                    content[place : place + 1] = bytes(rng.integers(0, 256, 1, dtype=np.uint8))
                case 1:
                    del content[place : place + int(rng.integers(1, 30))]
                case 2:
                    content[place:place] = (
                        MAGIC if rng.random() < 0.5 else bytes(rng.integers(0, 256, 5, dtype=np.uint8))
                    )
                case 3:
                    content[place % 4 : place % 4 + 4] = content[place : place + 4]
            content = content or bytearray(b"\0")
        file.write_bytes(content)
        try:
            for record in captioned(path):
                found = check(record, "recordio", Reencoding())
                reason = getattr(found, "reason", "")
                whole, refused = whole + (not reason), refused + bool(reason)
                if file is not path and not reason:
                    assert found.media in IMAGES
                if reason:
                    assert found.detail and "Traceback" not in found.detail
                json.dumps(record.meta, allow_nan=False)
        except DataError as error:
            refused += 1
            assert str(tmp_path) in str(error)
        file.write_bytes(sound[file])
    assert whole > 500 and refused > 500


WRITE = """
import sys, os, mxnet as mx, numpy as np
folder = sys.argv[1]
magic = bytes.fromhex("0a23d7ce")
rng = np.random.RandomState(3)
out = mx.recordio.MXIndexedRecordIO(folder + "/a.idx", folder + "/a.rec", "w")
for n in range(40):
    image = rng.randint(0, 256, (20, 30, 3)).astype(np.uint8)
    label = float(n) if n % 3 else np.array([2, 5, n, .1, .2, .3, .4], np.float32)
    head = mx.recordio.IRHeader(0, label, 100 + n, 0)
    packed = mx.recordio.pack_img(head, image, quality=90, img_fmt=".jpg" if n % 2 else ".png")
    if n % 5 == 0:
        _, payload = mx.recordio.unpack(packed)
        packed = mx.recordio.pack(head, payload + b"x" * (n % 4) + magic * (n // 10) + b"yz")
    out.write_idx(n, packed)
out.close()
"""
READ = """
import sys, hashlib, json, mxnet as mx, numpy as np
found = mx.recordio.MXIndexedRecordIO(sys.argv[1] + "/a.idx", sys.argv[1] + "/a.rec", "r")
rows = []
for key in found.keys:
    head, payload = mx.recordio.unpack(found.read_idx(key))
    rows.append([str(key), head.id, np.ravel(head.label).tolist(), hashlib.sha256(payload).hexdigest()])
print(json.dumps(rows))
"""


@pytest.mark.parametrize("by", ["mxnet", "us"])
def test_mxnet_reads_the_same(tmp_path, by):
    """What MXNet writes, and what our description of the format writes."""
    if by == "mxnet":
        in_mxnet(WRITE, tmp_path)
    else:
        write_records(tmp_path / "a.rec", [*IMAGES, MAGIC * 5, b"12345" + MAGIC * 2, b""])
    keys = mxnet_records.read_index(tmp_path / "a.idx")
    ours = [
        [
            keys[entry.offset],
            entry.number,
            list(entry.labels),
            hashlib.sha256(entry.payload.read_bytes()).hexdigest(),
        ]
        for entry in mxnet_records.read_records(tmp_path / "a.rec")
    ]
    assert json.loads(in_mxnet(READ, tmp_path)) == ours and len(ours) >= 9


def test_what_im2rec_packs_and_gluoncv_reads(tmp_path):
    """Its list, its records, and the labels of GluonCV's own dataset class."""
    for number, image in enumerate(IMAGES):
        (tmp_path / "root" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / "ab"[number % 2] / f"{number}.jpg").write_bytes(image)
    lines = [f"{n}\t2\t5\t{n}\t0.1\t0.2\t0.5\t0.75\t{'ab'[n % 2]}/{n}.jpg\n" for n in range(len(IMAGES))]
    written(tmp_path / "d.lst", "".join(lines))
    script = """
import sys, json, runpy, os
folder = sys.argv[1]
sys.argv = ["im2rec", folder + "/d", folder + "/root", "--pass-through", "--pack-label"]
import mxnet
runpy.run_path(os.path.join(os.path.dirname(mxnet.__file__), "tools", "im2rec.py"), run_name="__main__")
from gluoncv.data import RecordFileDetection
found = RecordFileDetection(folder + "/d.rec", coord_normalized=False)
pairs = [found[n] for n in range(len(found))]
print("\\n" + json.dumps([[label.tolist(), list(image.shape)] for image, label in pairs]))
"""
    theirs = json.loads(in_mxnet(script, tmp_path).splitlines()[-1])
    table = "file,text\n" + "".join(f"{'ab'[n % 2]}/{n}.jpg,picture {n}\n" for n in range(len(IMAGES)))
    written(tmp_path / "captions.csv", table)
    found = captioned(tmp_path / "d.rec")
    assert [one.media.read_bytes() for one in found] == IMAGES and len(theirs) == len(IMAGES)
    assert [one.captions for one in found] == [[f"picture {n}"] for n in range(len(IMAGES))]
    for one, (boxes, shape) in zip(found, theirs, strict=True):
        *_, label, left, top, right, bottom = one.meta["recordio"]["label"]
        assert np.allclose(boxes, [[left, top, right, bottom, label]])
        checked = check(one, "recordio", Reencoding())
        assert (checked.meta["height"], checked.meta["width"]) == tuple(shape[:2])
