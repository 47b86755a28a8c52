"""Readers of folders: those that img2dataset wrote, and any images and videos with a table."""

from __future__ import annotations

import datetime
import io
import json
import math
from pathlib import Path

import pytest

from data_tools.formats import Stored, folder, img2dataset
from data_tools.formats.filters import Filters
from dsmoe_vl.errors import DataError
from tests.support.datasets import photo, problems, read, written
from tests.support.tars import encoded_as, picture, write_tar


class TestImg2dataset:
    PICTURE = encoded_as(picture(), "JPEG")

    def sample(self, key, caption="a dog", extension="jpg", **columns):
        row = {"caption": caption, "key": key, "status": "success", "error_message": None, "width": 48, **columns}
        return [
            (f"{key}.{extension}", self.PICTURE),
            (f"{key}.txt", (caption or "").encode()),
            (f"{key}.json", json.dumps(row).encode()),
        ]

    def test_samples_are_byte_ranges_of_their_tars(self, tmp_path):
        write_tar(tmp_path / "00001.tar", self.sample("000010004", "ein Hühnchen"))
        write_tar(tmp_path / "00000.tar", self.sample("000000002") + self.sample("000000007", extension="png"))
        written(tmp_path / "00000_stats.json", {"count": 10})
        (tmp_path / "00000.parquet").write_bytes(b"a row an attempt")
        found = read(img2dataset, "--shards", tmp_path)
        assert [record.identifier for record in found] == ["00000-000000002", "00000-000000007", "00001-000010004"]
        assert [record.captions for record in found] == [["a dog"], ["a dog"], ["ein Hühnchen"]]
        assert [record.media.suffix for record in found] == [".jpg", ".png", ".jpg"]
        assert all(isinstance(r.media, Stored) and r.media.read_bytes() == self.PICTURE for r in found)

    def test_the_pictures_themselves_are_not_read(self, tmp_path, monkeypatch):
        members = [(f"{i}.jpg", bytes(2**20)) for i in range(4)]
        write_tar(tmp_path / "00000.tar", [part for m in members for part in (m, (m[0][0] + ".txt", b"a dog"))])
        read_bytes = []

        class Counting(io.FileIO):
            def readinto(self, buffer):
                read_bytes.append(super().readinto(buffer))
                return read_bytes[-1]

        monkeypatch.setattr(Path, "open", lambda path, mode="r": io.BufferedReader(Counting(path), 4096))
        assert len(read(img2dataset, "--shards", tmp_path)) == 4
        assert 0 < sum(read_bytes) < 2**19

    def test_what_is_kept_of_their_metadata(self, tmp_path):
        columns = {
            "url": "http://x/a.jpg",
            "original_width": 640,
            "original_height": 480,
            "LICENSE": "?",
            "sha256": "theirs",
            "tasks": "retrieval",
            "content": "news",
            "punsafe": 0.2,
            "similarity": math.nan,
        }
        write_tar(tmp_path / "00000.tar", self.sample("1", **columns))
        (record,) = read(img2dataset, "--shards", tmp_path)
        assert record.meta == {
            "url": "http://x/a.jpg",
            "original_width": 640,
            "original_height": 480,
            "licence": "?",
            "img2dataset": {"key": "1", "tasks": "retrieval", "content": "news", "punsafe": 0.2},
        }

    def test_captions_may_be_missing(self, tmp_path):
        members = [*self.sample("1", None), ("2.jpg", self.PICTURE), *self.sample("3")[::2]]
        write_tar(tmp_path / "00000.tar", members)
        *without, last = read(img2dataset, "--shards", tmp_path)
        assert [record.problem.partition(":")[0] for record in without] == ["no caption"] * 2
        assert last.captions == ["a dog"]

    def test_a_byte_order_mark_is_no_text(self, tmp_path):
        write_tar(tmp_path / "00000.tar", self.sample("1", "\ufeffa dog"))
        assert [record.captions for record in read(img2dataset, "--shards", tmp_path)] == [["a dog"]]

    def test_samples_that_cannot_be_read_are_rejected_one_by_one(self, tmp_path):
        members = [
            *self.sample("1"),
            ("2.jpg", self.PICTURE),
            ("2.json", b"{"),
            ("3.jpg", self.PICTURE),
            ("3.txt", b"\xff"),
            ("4.txt", b"no picture"),
            ("5.json", b"[]"),
            *self.sample("6"),
            *self.sample("6"),
            *self.sample("7"),
            *self.sample("1"),
            *self.sample("8"),
        ]
        write_tar(tmp_path / "00000.tar", members)
        found = read(img2dataset, "--shards", tmp_path)
        assert [record.identifier for record in found if not record.problem] == ["00000-1", "00000-7", "00000-8"]
        assert list(problems(found).values()) == [
            "malformed text or JSON",
            "malformed text or JSON",
            "no image or video",
            "malformed text or JSON",
            "repeated key",
            "repeated key",
        ]
        assert all("00000.tar" in record.problem for record in found if record.problem)
        assert len({record.identifier for record in found}) == len(found)

    @pytest.mark.parametrize("damage", ["cut in the second picture", "cut between files", "overwritten", "empty"])
    def test_of_a_damaged_tar_what_comes_before_is_used(self, tmp_path, damage):
        path = write_tar(tmp_path / "00000.tar", self.sample("1") + self.sample("2") + self.sample("3"))
        second = read(img2dataset, "--shards", tmp_path)[1].media
        content = path.read_bytes()
        header = second.offset - 512
        path.write_bytes(
            {
                "cut in the second picture": content[: second.offset + 100],
                "cut between files": content[: second.offset + -(-second.size // 512) * 512],
                "overwritten": content[:header] + b"x" * 512 + content[header + 512 :],
                "empty": b"",
            }[damage]
        )
        write_tar(tmp_path / "00001.tar", self.sample("4"))
        *before, damaged, last = read(img2dataset, "--shards", tmp_path)
        # Only a header of the next sample would show that the first is whole.
        expected = ["00000-1"] if "cut" in damage else []
        assert [record.identifier for record in before] == expected and last.identifier == "00001-4"
        assert damaged.problem.startswith(f"damaged shard: {path}: ") and damaged.media is None

    def test_filters_skip_without_rejecting(self, tmp_path):
        samples = [{"punsafe": 0.1, "original_width": 300}, {"punsafe": 0.9, "original_width": 300}, {"punsafe": None}]
        members = [member for i, row in enumerate(samples) for member in self.sample(str(i), **row)]
        write_tar(tmp_path / "00000.tar", members)
        options = ["--shards", tmp_path, "--filter", "punsafe<=0.5", "--filter"]
        assert [record.identifier for record in read(img2dataset, *options, "original_width>=256")] == ["00000-0"]
        with pytest.raises(DataError, match=r"nothing in .* has 'NSFW'; columns there: caption, key, status"):
            read(img2dataset, *options, "NSFW==UNLIKELY")
        with pytest.raises(DataError, match=r"none of the 3 rows of .* has punsafe<=0.5 and key==x"):
            read(img2dataset, *options, "key==x")

    def test_no_tars(self, tmp_path):
        with pytest.raises(DataError, match=r"--shards .*: no \*\.tar in it"):
            read(img2dataset, "--shards", tmp_path)
        with pytest.raises(DataError, match=r"--shards .*missing: no such folder"):
            read(img2dataset, "--shards", tmp_path / "missing")


class TestFilters:
    @pytest.mark.parametrize(
        ("condition", "values", "accepted"),
        [
            ("x<=0.5", [0.5, "0.5", 0.6, None, "", math.nan, "many", [0]], [0.5, "0.5"]),
            ("x > 0", [0, 1, True, False], [1, True]),
            ("x==3", [3, "3", "3.0", 4, "three"], [3, "3", "3.0"]),
            ("x!=3", [3, "4", "three", None, "", math.nan], ["4", "three"]),
            ("x==UNLIKELY", ["UNLIKELY", " UNLIKELY", "NSFW", 1], ["UNLIKELY", " UNLIKELY"]),
            ("x==true", [True, False, "true"], [True, "true"]),
        ],
    )
    def test_comparisons(self, condition, values, accepted):
        filters = Filters([condition])
        assert [value for value in values if filters.accept({"x": value})] == accepted

    @pytest.mark.parametrize("condition", ["x", "x=3", "<3", "x<", "x<many", ""])
    def test_malformed_conditions(self, condition):
        with pytest.raises(DataError, match=r"--filter '.*': "):
            Filters([condition])


class TestFolder:
    def test_the_kinds_of_tables_say_the_same(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = [
            {"file": "b/x.jpg", "text": "a dog, running"},
            {"file": "a.MP4", "text": "a cat"},
            {"file": "./b/x.jpg", "text": "dogs"},
        ]
        written(tmp_path / "t.csv", 'file, text\nb/x.jpg,"a dog, running"\na.MP4,a cat\n./b/x.jpg,dogs\n')
        written(tmp_path / "t.tsv", "text\tfile\na dog, running\tb/x.jpg\na cat\ta.MP4\ndogs\t./b/x.jpg\n")
        lists = [{"file": "b/x.jpg", "text": ["a dog, running", "dogs"]}, {"file": "a.MP4", "text": ["a cat"]}]
        written(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
        written(tmp_path / "lists.jsonl", "\n".join(map(json.dumps, lists)))
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(lists), tmp_path / "lists.parquet")
        for table in ("t.csv", "t.tsv", "t.jsonl", "lists.jsonl", "t.parquet", "lists.parquet"):
            found = read(folder, "--media", tmp_path, "--table", tmp_path / table)
            assert [(r.identifier, r.kind, r.media, r.captions, r.problem) for r in found] == [
                ("b/x.jpg", "image", tmp_path / "b" / "x.jpg", ["a dog, running", "dogs"], ""),
                ("a.MP4", "video", tmp_path / "a.MP4", ["a cat"], ""),
            ], table

    def test_named_columns(self, tmp_path):
        rows = [
            {"path": "a.mp4", "say": None, "n": 7, "s": "all of it", "sal": [[0.5, 1]], "link": "u", "by": "x", "c": 1},
            {"path": "a.mp4", "say": "a cat", "n": 8, "c": 2},
            {"path": "b.mp4", "say": "a dog", "n": 9, "link": "", "c": math.nan},
        ]
        table = written(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
        maps = ["file=path", "text=say", "id=n", "summary=s", "saliency=sal", "url=link", "licence=by"]
        options = [part for text in maps for part in ("--map", text)]
        first, second = read(folder, "--media", tmp_path, "--table", table, *options, "--keep", "c")
        assert (first.identifier, first.captions, second.identifier) == ("7", [None, "a cat"], "9")
        named = {"url": "u", "licence": "x", "summary": "all of it", "saliency": [[0.5, 1]], "c": 1}
        assert first.meta == named and not any(second.meta.values())

    def test_columns_by_their_own_names(self, tmp_path):
        row = {"file": "a.mp4", "id": "n", "url": "u", "summary": "all of it", "importance": [0.5, 1], "text": "a cat"}
        table = written(tmp_path / "t.jsonl", json.dumps(row))
        (record,) = read(folder, "--media", tmp_path, "--table", table)
        assert (record.identifier, record.captions) == ("n", ["a cat"])
        assert record.meta == {"url": "u", "summary": "all of it", "importance": [0.5, 1]}
        without = [part for field in ("id", "text", "importance") for part in ("--map", field + "=")]
        (record,) = read(folder, "--media", tmp_path, "--table", table, *without)
        assert (record.identifier, record.captions) == ("a.mp4", [None])
        assert record.meta == {"url": "u", "summary": "all of it"}

    def test_lists_in_cells_of_csv_and_no_text_beside_them(self, tmp_path):
        table = written(tmp_path / "t.csv", 'file,scores\na.mp4,"[0.1, 0.9]"\nb.mp4,"[0.1"\nc.mp4,0.5\nd.mp4,\n')
        found = read(folder, "--media", tmp_path, "--table", table, "--map", "importance=scores")
        assert found[0].meta == {"importance": [0.1, 0.9]}
        assert problems(found) == {"b.mp4": "malformed importance", "c.mp4": "malformed importance"}

    def test_cells_that_json_does_not_know(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = [{"file": "a.jpg", "text": "x", "day": datetime.date(2024, 2, 29)}]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
        (record,) = read(folder, "--media", tmp_path, "--table", tmp_path / "t.parquet", "--keep", "day")
        assert record.meta == {"day": "2024-02-29"}

    def test_a_name_without_its_ending(self, tmp_path):
        """As in ROCO's tables. A file of the very name counts before one with an ending more."""
        for name in ("PMC1_F1.jpg", "b.webp", "c.jpg", "c.jpg.png", "v.mp4"):
            photo(tmp_path / name)
        table = written(tmp_path / "t.csv", "ID,Caption\nPMC1_F1,a\nb,b\nc.jpg,c\nd,d\nv,v\n")
        found = read(folder, "--media", tmp_path, "--table", table, "--map", "file=ID", "--map", "text=Caption")
        assert [(record.identifier, record.media.name) for record in found] == [
            ("PMC1_F1", "PMC1_F1.jpg"), ("b", "b.webp"), ("c.jpg", "c.jpg"), ("d", "d"), ("v", "v.mp4"),
        ]  # fmt: skip
        assert [record.kind for record in found] == ["image", "image", "image", "image", "video"]

    def test_paths_that_are_refused(self, tmp_path):
        inner = tmp_path / "inner"
        photo(tmp_path / "secret.jpg")
        photo(inner / "a.jpg")
        written(inner / "a.css", "body { color: red }")
        names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "x/../../secret.jpg", "x/../a.jpg", "a.css", "..", ""]
        rows = [{"file": name, "text": "x"} for name in [*names, None]]
        table = written(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
        found = read(folder, "--media", inner, "--table", table)
        outside = "outside of the folder"
        # Two ways to write one path are one file.
        assert [record.problem.partition(":")[0] for record in found] == [
            outside,
            outside,
            "",
            "unknown kind",
            outside,
            "no file",
            "no file",
        ]
        assert found[2].media == inner / "a.jpg"
        assert len({record.identifier for record in found}) == len(found)

    def test_filters(self, tmp_path):
        table = written(tmp_path / "t.csv", "file,text,score\na.jpg,x,0.5\na.jpg,y,0.1\nb.jpg,z,0.1\n")
        options = ["--media", tmp_path, "--table", table, "--filter"]
        (record,) = read(folder, *options, "score>=0.3")
        assert record.captions == ["x"]
        with pytest.raises(DataError, match=r"nothing in .*t.csv has 'points'; columns there: file, text, score"):
            read(folder, *options, "points>1")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--map", "text=caption"], r"--map text=caption: no column 'caption' in .*there are file, words, id"),
            (["--map", "text="], r"t.csv, line 2: no 'text' among file, words, id: name it with --map text=COLUMN"),
            (["--map", "file="], r"--map file=: write FIELD=COLUMN"),
            ([], r"t.csv, line 2: no 'text' among file, words, id: name it with --map text=COLUMN"),
            (["--map", "words"], r"--map words: write FIELD=COLUMN; fields are file, text, id"),
            (["--map", "caption=words"], r"--map caption=words: write FIELD=COLUMN"),
            (
                ["--map", "text=words", "--map", "url=link"],
                r"--map url=link: no column 'link' in .*there are file, words",
            ),
            (["--map", "text=words", "--keep", "by"], r"--keep by: no column 'by' in "),
            (["--map", "text=words"], r"--map id=id: .* gives a.jpg and b.jpg the same id, '1'.* none by --map id="),
            (["--table", "t.xlsx"], r"--table t.xlsx: the name must end in \.csv"),
        ],
    )
    def test_options_that_do_not_fit(self, tmp_path, options, message):
        table = written(tmp_path / "t.csv", "file,words,id\na.jpg,x,1\nb.jpg,y,1\n")
        with pytest.raises(DataError, match=message):
            read(folder, "--media", tmp_path, "--table", table, *options)

    def test_text_files_beside_the_media(self, tmp_path):
        for name in ("b.jpg", "a/c.JPEG", "a/d.png", "._b.jpg", ".thumbs/b.jpg"):
            photo(tmp_path / name)
        written(tmp_path / "b.txt", "\ufeffa dog\r\n\r\ndogs\r\n")
        written(tmp_path / "a" / "c.txt", "a cat")
        written(tmp_path / "a" / "lost.txt", "a hen")
        (tmp_path / "a" / "e.mp4").touch()
        (tmp_path / "a" / "e.txt").write_bytes(b"\xff\xfe")
        found = read(folder, "--media", tmp_path)
        assert [(record.identifier, record.kind, record.captions) for record in found] == [
            ("a/c.JPEG", "image", ["a cat"]),
            ("a/d.png", "image", []),
            ("a/e.mp4", "video", []),
            ("b.jpg", "image", ["a dog", "dogs"]),
            ("a/lost.txt", "image", []),
        ]
        assert problems(found) == {
            "a/d.png": "missing text file",
            "a/e.mp4": "unreadable text file",
            "a/lost.txt": "missing media",
        }
        assert found[0].media == tmp_path / "a" / "c.JPEG"
        with pytest.raises(DataError, match=r"--table FILE"):
            read(folder, "--media", tmp_path, "--keep", "x")

    def test_real_captions_and_clips(self, coco, shared_data, tmp_path):
        root, images = coco
        rows = [{"file": f"val2017/{name}", "text": texts} for name, _, texts in images]
        table = written(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
        found = read(folder, "--media", root, "--table", table)
        assert [record.captions for record in found] == [row["text"] for row in rows]
        assert all(record.media.is_file() and record.kind == "image" for record in found)
        clips = sorted(
            path.name for path in (shared_data / "videos_intel").rglob("*") if path.suffix in (".mkv", ".mp4")
        )
        found = read(folder, "--media", shared_data / "videos_intel")
        assert sorted(Path(r.identifier).name for r in found if r.kind == "video") == clips
