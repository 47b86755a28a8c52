"""Pages of PDF files: what reportlab writes arrives as pictures and texts, sizes are bounded, reasons for the rest."""

from __future__ import annotations

import argparse
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from data_tools.check import Checked, Reencoding, check
from data_tools.convert import main
from data_tools.formats import pdf
from data_tools.formats.pdf_pages import _in_one_line
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.errors import ConfigError, DataError
from tests.support.datasets import read, written
from tests.support.domain_files import pdf_of
from tests.support.fuzz_files import corrupted_bytes

pytest.importorskip("pypdfium2", reason="pypdfium2: PDF was not checked")
pytest.importorskip("reportlab", reason="reportlab: PDF was not checked")


def saved(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def parsed(*words):
    parser = argparse.ArgumentParser()
    pdf.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def picture(record):
    return np.asarray(Image.open(io.BytesIO(record.media.read_bytes())))


def test_pages_and_their_texts(tmp_path):
    saved(tmp_path / "2024/b.PDF", pdf_of(["Revenue grew by 4 %\nCosts fell (a little)", "Outlook"]))
    saved(tmp_path / "a", b"\n\n" + pdf_of(["Über Größe"], compress=False))  # by content, wherever it begins
    found = read(pdf, "--documents", tmp_path, "--dpi", 72)
    assert {record.identifier: record.captions for record in found} == {
        "2024/b.PDF#page=1": ["Revenue grew by 4 % Costs fell (a little)"],
        "2024/b.PDF#page=2": ["Outlook"],
        "a#page=1": ["Über Größe"],
    }
    assert str(found[1].media).endswith("2024/b.PDF, page 2")
    for record, bar in zip(found, (20, 40, 20), strict=True):  # points, which are pixels at 72 dpi
        pixels = picture(record)
        assert pixels.shape == (150, 200, 3)
        assert (pixels[95:125, 34 : 26 + bar] == 0).all() and (pixels[95:125, 34 + bar :] == 255).all()


def test_dpi_and_the_limit_of_pixels(tmp_path):
    saved(tmp_path / "a.pdf", pdf_of(["text"]))
    saved(tmp_path / "b.pdf", pdf_of(["text"], size=(14400, 200)))
    for dpi, megapixels, sizes in [
        (100, 8, [(278, 209), (20000, 278)]),
        (144, 64, [(400, 300), (28800, 400)]),
        (144, 0.01, [(115, 86), (838, 11)]),
    ]:
        found = read(pdf, "--documents", tmp_path, "--dpi", dpi, "--megapixels", megapixels)
        checked = [check(record, "pdf", Reencoding()) for record in found]
        made = [(one.meta["width"], one.meta["height"]) for one in checked]
        assert all(width * height <= megapixels * 1e6 for width, height in made)
        assert np.abs(np.array(made) - np.array(sizes)).max() <= 10


def test_captions_by_page(tmp_path, capsys):
    saved(tmp_path / "docs/a.pdf", pdf_of(["one", "", "three"]))
    table = written(tmp_path / "t.csv", "file,text\na.pdf#page=2,a scan\na.pdf#page=2,a picture\nb.pdf#page=1,none\n")
    given = parsed("--documents", tmp_path / "docs", "--captions", table)
    (record,) = pdf.records(given)
    assert (record.identifier, record.captions, record.problem) == ("a.pdf#page=2", ["a scan", "a picture"], "")
    assert pdf.unused(given) == "2 pages without a caption, captions of 1 others in t.csv (b.pdf#page=1)"
    with pytest.raises(DataError, match=r"names 'a.pdf', and the data has nothing .* such as 'a.pdf#page=1'"):
        read(pdf, "--documents", tmp_path / "docs", "--captions", written(table, "file,text\na.pdf,none\n"))


def test_files_and_pages_that_cannot_be_used(tmp_path, capsys):
    docs, whole = tmp_path / "docs", pdf_of(["text", ""])
    saved(docs / "a.pdf", whole)
    saved(docs / "broken.pdf", whole[:300])
    saved(docs / "encrypted.pdf", pdf_of(["text"], password="secret"))
    saved(docs / "table.csv", b"file,text\n")
    words = ["pdf", "--documents", docs, "--output", tmp_path / "out", "--max-rejected", 0.9]
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert "wrote 1 samples" in said and "not used: 1 no PDF file (table.csv)" in said
    rows = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert {row["id"]: row["reason"] for row in rows} == {
        "a.pdf#page=2": "page without a text", "broken.pdf": "broken PDF", "encrypted.pdf": "encrypted PDF",
    }  # fmt: skip
    assert all(str(docs) in row["detail"] for row in rows)
    assert "name texts with --captions" in rows[0]["detail"] and "password" in rows[2]["detail"]


def test_a_file_that_goes_away(tmp_path):
    path = saved(tmp_path / "a.pdf", pdf_of(["text"]))
    (record,) = read(pdf, "--documents", tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    assert check(record, "pdf", Reencoding()).reason == "unreadable image"
    path.unlink()
    found = check(record, "pdf", Reencoding())
    assert (found.reason, found.detail) == ("missing file", f"{path}, page 1")


def test_an_empty_password_is_none(tmp_path):
    from reportlab.lib.pdfencrypt import StandardEncryption
    from reportlab.pdfgen.canvas import Canvas

    canvas = Canvas(str(tmp_path / "a.pdf"), encrypt=StandardEncryption("", ownerPassword="owner", canCopy=0))
    canvas.drawString(9, 9, "to be read")
    canvas.save()
    assert [record.captions for record in read(pdf, "--documents", tmp_path)] == [["to be read"]]


def test_texts_in_one_line():
    assert _in_one_line("reve\x02\r\nnue  rose\r\n\x00by\ufffe\n 4\t%\x07") == "revenue rose by 4 %"


@pytest.mark.parametrize(("words", "message"), [
    (("--documents", "{}/gone"), "gone: no such folder"),
    (("--documents", "{}"), r"no PDF file is there, but 1 no PDF file \(notes.txt\)"),
    (("--documents", "{}", "--dpi", "0"), "--dpi 0: give 1 to 2400"),
    (("--documents", "{}", "--dpi", "nan"), "--dpi nan: give 1 to 2400"),
    (("--documents", "{}", "--megapixels", "1e9"), r"--megapixels 1e\+09: give 0.01 to 64"),
    (("--documents", "{}", "--captions", "{}/gone.csv"), "gone.csv: No such file"),
])  # fmt: skip
def test_errors_of_users(tmp_path, words, message):
    written(tmp_path / "notes.txt", "none")
    with pytest.raises((DataError, ConfigError), match=message):
        read(pdf, *(word.replace("{}", str(tmp_path)) for word in words))


def test_without_pypdfium2(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(ConfigError, match=r"^the format pdf needs pypdfium2: pip install 'dsmoe-vl\[documents\]'$"):
        read(pdf, "--documents", tmp_path)


def test_one_process_and_two_give_the_same_bytes(tmp_path):
    for n in range(3):
        saved(tmp_path / f"docs/{n}.pdf", pdf_of([f"page {n}", "", "end"]))
    saved(tmp_path / "docs/broken.pdf", b"%PDF-1.7 nothing")
    for workers in (1, 2):
        words = ["pdf", "--documents", tmp_path / "docs", "--output", tmp_path / str(workers), "--workers", workers,
                 "--samples-per-shard", 2, "--max-rejected", 0.5]  # fmt: skip
        assert main([str(word) for word in words]) == 0
    one, two = ({p.name: p.read_bytes() for p in sorted((tmp_path / n).iterdir())} for n in "12")
    assert one == two and len([name for name in one if name.endswith(".tar")]) == 5
    samples = list(iterate_samples(SourceConfig.at(tmp_path / "1")))
    assert [sample.text for sample in samples] == ["page 0", "end", "page 1", "end", "page 2", "end"]


def all_of(given, folder):
    """The records, or none if nothing is left that is PDF."""
    try:
        return list(pdf.records(given))
    except DataError as error:
        assert str(error) == f"--documents {folder}: no PDF file is there, but 1 no PDF file (a.pdf)"
        return []


def test_mutated_files(tmp_path):
    """Samples or reasons, in one line each."""
    sources = [pdf_of(["Revenue grew", "Outlook"], compress, password=password)
               for compress, password in ((False, ""), (True, ""), (False, "secret"))]  # fmt: skip
    rng = np.random.default_rng(2)
    whole = refused = 0
    for number in range(1000):
        saved(tmp_path / "a.pdf", corrupted_bytes(rng, sources[number % len(sources)]))
        for record in all_of(parsed("--documents", tmp_path, "--dpi", 40), tmp_path):
            found = check(record, "pdf", Reencoding())
            if isinstance(found, Checked):
                whole += 1
                json.dumps(found.meta, allow_nan=False)
            else:
                refused += 1
                assert found.reason and found.detail and "\n" not in found.detail
    assert whole > 300 and refused > 300
