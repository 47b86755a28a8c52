"""Readers of image datasets, on tiny datasets in their published layouts, with what is known to be wrong in these."""

from __future__ import annotations

from collections import Counter

import pytest

from data_tools.formats import flickr, karpathy, llava
from dsmoe_vl.errors import DataError
from tests.support.datasets import problems, read, written


class TestKarpathy:
    def dataset(self, path, rows):
        images = [
            {"imgid": i, "sentences": [{"raw": text, "tokens": text.split()} for text in texts], "sentids": [], **row}
            for i, (texts, row) in enumerate(rows)
        ]
        return written(path, {"images": images, "dataset": "tiny"})

    def test_the_folder_of_coco_is_part_of_the_path_and_train_has_restval(self, tmp_path):
        rows = [
            (["a cat ."], {"filepath": "val2014", "filename": "COCO_val2014_000000000042.jpg", "split": "test"}),
            (["a dog .\n", "dogs"], {"filepath": "train2014", "filename": "COCO_train2014_000000000007.jpg"}),
            (["a hen ."], {"filepath": "val2014", "filename": "COCO_val2014_000000000009.jpg", "split": "restval"}),
        ]
        rows = [(texts, {"split": "train", "cocoid": 100 + i, **row}) for i, (texts, row) in enumerate(rows)]
        path = self.dataset(tmp_path / "dataset_coco.json", rows)
        options = ["--images", tmp_path, "--annotations", path, "--part"]
        first, second = read(karpathy, *options, "train")
        assert first.media == tmp_path / "train2014" / "COCO_train2014_000000000007.jpg"
        assert (first.captions, first.meta) == (["a dog .\n", "dogs"], {"cocoid": 101})
        assert second.identifier == "COCO_val2014_000000000009"
        assert [record.meta["cocoid"] for record in read(karpathy, *options, "test")] == [100]
        with pytest.raises(DataError, match=r"--part val: .*dataset_coco.json has none of it, but 1 images of test"):
            read(karpathy, *options, "val")

    def test_flickr_has_no_folder_in_its_rows(self, coco, tmp_path):
        root, images = coco
        rows = [(texts, {"filename": name, "split": "val"}) for name, _, texts in images]
        path = self.dataset(tmp_path / "dataset_flickr8k.json", rows)
        found = read(karpathy, "--images", root / "val2017", "--annotations", path, "--part", "val")
        assert [(r.media.name, r.captions) for r in found] == [(name, texts) for name, _, texts in images]
        assert all(record.media.is_file() and record.meta == {} for record in found)

    @pytest.mark.parametrize("content", [[], {"annotations": []}, {"images": [{"filename": "a.jpg", "split": "val"}]}])
    def test_another_file(self, tmp_path, content):
        path = written(tmp_path / "other.json", content)
        with pytest.raises(DataError, match=r"--annotations .*other.json: .*give dataset_coco.json"):
            read(karpathy, "--images", tmp_path, "--annotations", path, "--part", "val")


class TestFlickr:
    TOKEN = 'b.jpg#0\tA dog , running .\nb.jpg#1\tDogs\na.jpg#0\tA "cat" | here\n'
    CSV = 'image,caption\nb.jpg,"A dog , running ."\nb.jpg,Dogs\na.jpg,"A ""cat"" | here"\n'
    NUMBERED = (
        'image_name,comment_number,comment\nb.jpg,0,A dog , running .\nb.jpg,1,Dogs\na.jpg,0,"A ""cat"" | here"\n'
    )
    BARS = (
        'image_name| comment_number| comment\nb.jpg| 0| A dog , running .\nb.jpg| 1| Dogs\na.jpg| 0| A "cat" | here\n'
    )

    def read(self, tmp_path, content):
        path = written(tmp_path / "captions.any", content)
        return read(flickr, "--images", tmp_path, "--captions", path)

    @pytest.mark.parametrize("content", [TOKEN, CSV, NUMBERED, BARS, "\ufeff" + CSV.replace("\n", "\r\n")])
    def test_the_kind_of_file_follows_from_its_first_line(self, tmp_path, content):
        found = self.read(tmp_path, content)
        assert [(record.identifier, record.media, record.captions) for record in found] == [
            ("b", tmp_path / "b.jpg", ["A dog , running .", "Dogs"]),
            ("a", tmp_path / "a.jpg", ['A "cat" | here']),
        ]

    def test_a_line_without_its_delimiter_costs_itself_alone(self, tmp_path):
        content = self.BARS.replace("b.jpg| 1| Dogs", "b.jpg| 4   A dog runs across the grass .")
        first, second, malformed = self.read(tmp_path, content)
        assert (first.captions, second.captions) == (["A dog , running ."], ['A "cat" | here'])
        assert malformed.problem == f"malformed line: captions.any, line 3: {content.splitlines()[2]!r}"

    @pytest.mark.parametrize(
        ("content", "lines"),
        [
            (TOKEN + "c.jpg A bird\nd.jpg#x\tA bird\n", (4, 5)),
            (CSV + 'c.jpg,"A bird\nc.jpg,A bird\nnothing\n,A bird\n', (5, 7, 8)),
            (BARS + "c.jpg| 0\nc.jpg| A bird| again\n", (5, 6)),
        ],
    )
    def test_malformed_lines_are_rejected_one_by_one(self, tmp_path, content, lines):
        found = self.read(tmp_path, content)
        assert problems(found) == {f"line {line}": "malformed line" for line in lines}
        assert len({record.identifier for record in found}) == len(found)

    def test_a_name_of_flickr8k_with_a_number_behind_it(self, tmp_path):
        (record,) = self.read(tmp_path, "2258277193_586949ec62.jpg.1#0\tsome people\n")
        assert record.media == tmp_path / "2258277193_586949ec62.jpg.1"  # is reported missing

    @pytest.mark.parametrize("content", ["", "\n", "a caption\n", "file,text\na.jpg,a dog\n"])
    def test_another_file(self, tmp_path, content):
        with pytest.raises(DataError, match=r"--captions .*captions.any: its first line is .*expected"):
            self.read(tmp_path, content)

    def test_real_captions_in_each_kind(self, coco, tmp_path):
        root, images = coco
        rows = [(name, i, " ".join(text.split())) for name, _, texts in images for i, text in enumerate(texts)]
        for content in (
            "".join(f"{name}#{i}\t{text}\n" for name, i, text in rows),
            "image_name| comment_number| comment\n" + "".join(f"{name}| {i}| {text}\n" for name, i, text in rows),
        ):
            path = written(tmp_path / "results", content)
            found = read(flickr, "--images", root / "val2017", "--captions", path)
            assert [(r.media.name, text) for r in found for text in r.captions] == [(n, text) for n, _, text in rows]
            assert all(record.media.is_file() for record in found)


class TestLlava:
    def row(self, *answers, **row):
        turns = [
            {"from": speaker, "value": value}
            for answer in answers
            for speaker, value in (("human", "<image>\nWhat is it?"), ("gpt", answer))
        ]
        return {"conversations": turns, **row}

    def read(self, tmp_path, rows):
        return read(llava, "--images", tmp_path, "--annotations", written(tmp_path / "llava.json", rows))

    def test_the_first_answer_is_the_caption_and_all_is_kept(self, tmp_path):
        rows = [self.row("a bus\n<image>", id="7", image="coco/a.jpg"), self.row("a bus", "red", id="7", image="b.jpg")]
        single, several = self.read(tmp_path, rows)
        assert single.media == tmp_path / "coco" / "a.jpg"
        assert [" ".join(text.split()) for text in single.captions] == ["a bus"]
        assert single.meta == {"conversations": rows[0]["conversations"]}
        assert several.captions == ["a bus"]
        assert several.meta == {"conversations": rows[1]["conversations"], "tasks": ["caption"]}

    def test_identifiers_are_unique_and_stay(self, tmp_path):
        rows = [self.row("x", id=name, image="a.jpg") for name in ("7", "7", 7, "0-7", "7")] + [self.row(image="a.jpg")]
        first, second = self.read(tmp_path, rows), self.read(tmp_path, rows)
        assert first == second and len({record.identifier for record in first}) == 6
        assert first[1].identifier == "0000001-7"

    def test_rows_that_show_no_single_image(self, tmp_path):
        rows = [
            self.row("x"),
            self.row("x", image=""),
            self.row("x", image=[]),
            self.row("x", image=["a.jpg"]),
            self.row("x", image=["a.jpg", "b.jpg"]),
            self.row("x", video="a.mp4"),
            self.row("x", image=5),
            {"image": "a.jpg"},
            {"image": "a.jpg", "conversations": ["x"]},
            "x",
        ]
        found = self.read(tmp_path, rows)
        assert [record.problem.partition(":")[0] for record in found] == [
            *["no image"] * 3,
            "",
            "several images",
            "no image",
            *["malformed row"] * 4,
        ]
        assert found[3].media == tmp_path / "a.jpg"

    def test_nothing_answered(self, tmp_path):
        rows = [{"image": "a.jpg", "conversations": turns} for turns in ([], [{"from": "human", "value": "x"}])]
        assert [record.captions for record in self.read(tmp_path, rows)] == [[], []]

    def test_another_file(self, tmp_path):
        with pytest.raises(DataError, match=r"--annotations .*llava.json: not a LLaVA file: a JSON list"):
            self.read(tmp_path, {"images": []})

    def test_real_captions(self, coco, tmp_path):
        root, images = coco
        rows = [self.row(text, id=str(number), image=name) for name, number, texts in images for text in texts]
        found = read(llava, "--images", root / "val2017", "--annotations", written(tmp_path / "llava.json", rows))
        assert Counter(text for r in found for text in r.captions) == Counter(t for *_, texts in images for t in texts)
        assert all(record.media.is_file() for record in found)
