"""A folder with recordings of speech: which sample a recording belongs to, and what of it is stored or refused."""

from __future__ import annotations

import hashlib
import json
import random

import numpy as np
import pytest

from data_tools.check import Checked, check
from data_tools.convert import convert, main
from data_tools.formats import Record, folder
from data_tools.parts import Settings
from data_tools.recordings import TOO_LONG
from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.contents import contents_of
from dsmoe_vl.data.recording import decode_recording
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.errors import DataError
from tests.support.datasets import clip, photo, problems, read, written
from tests.support.fuzz_files import corrupted_bytes
from tests.support.sound_files import KINDS, encoded, recording, tones

AS_IT_IS = Settings("folder").reencoding


def checked(record):
    return check(record, "folder", AS_IT_IS)


def heard(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(recording("flac", tones(0.2)) if data is None else data)
    return path


def alone(path):
    return Record(path.name, "image", None, ["the words"], recording=path)


def unused(path):
    return folder.unused(type("Arguments", (), {"table": None, "media": path}))


class TestFiles:
    def test_a_recording_belongs_to_the_file_of_its_name(self, tmp_path):
        photo(tmp_path / "a.jpg"), heard(tmp_path / "a.flac"), written(tmp_path / "a.txt", "a dog\ndogs")
        clip(tmp_path / "b" / "b.mp4"), heard(tmp_path / "b" / "b.WAV", recording("wav"))
        heard(tmp_path / "c.mp3", recording("mp3")), written(tmp_path / "c.txt", "one line\nand another\n")
        photo(tmp_path / "d.jpg"), written(tmp_path / "d.txt", "a cat")
        heard(tmp_path / "e", recording("opus")), written(tmp_path / "e.txt", "no extension")
        heard(tmp_path / "song.mp3"), heard(tmp_path / "sound"), heard(tmp_path / "a.wav")
        found = read(folder, "--media", tmp_path)
        assert [(record.identifier, record.has, record.captions, record.problem) for record in found] == [
            ("a.jpg", ("image", "speech"), ["a dog", "dogs"], ""),
            ("b/b.mp4", ("video", "speech"), [], ""),
            ("c.mp3", ("speech",), ["one line and another"], ""),
            ("d.jpg", ("image",), ["a cat"], ""),
            ("e", ("speech",), ["no extension"], ""),
        ]
        assert [record.recording and record.recording.name for record in found] == [
            "a.flac",
            "b.WAV",
            "c.mp3",
            None,
            "e",
        ]
        assert unused(tmp_path) == (
            "2 recording without a text file, image or video (song.mp3, sound), "
            "1 a second recording of its name (a.wav)"
        )
        tasks = [checked(record).meta["tasks"] for record in found]
        assert tasks == [
            ["caption", "retrieval"], ["retrieval"], ["transcript"], ["caption", "retrieval"], ["transcript"],
        ]  # fmt: skip

    def test_text_that_is_missing_or_cannot_be_read(self, tmp_path):
        photo(tmp_path / "a.jpg"), heard(tmp_path / "b.flac"), (tmp_path / "b.txt").write_bytes(b"\xff")
        heard(tmp_path / "c.flac"), written(tmp_path / "c.txt", " \n"), written(tmp_path / "d.txt", "a hen")
        found = read(folder, "--media", tmp_path)
        assert problems(found) == {
            "a.jpg": "missing text file", "b.flac": "unreadable text file", "d.txt": "missing media",
        }  # fmt: skip
        assert checked(found[2]).reason == "empty caption"

    def test_the_folder_alone_makes_samples(self, tmp_path, capsys):
        photo(tmp_path / "m" / "a.jpg"), heard(tmp_path / "m" / "a.flac"), written(tmp_path / "m" / "a.txt", "a dog")
        heard(tmp_path / "m" / "b.ogg", recording("opus")), written(tmp_path / "m" / "b.txt", "words")
        heard(tmp_path / "m" / "c.wav")
        assert main(["folder", "--media", str(tmp_path / "m"), "--output", str(tmp_path / "s"), "--workers", "1"]) == 0
        assert "not used: 1 recording without a text file, image or video (c.wav)" in capsys.readouterr().out
        both, spoken = iterate_samples(SourceConfig.at(tmp_path / "s"))
        data = (tmp_path / "m" / "a.flac").read_bytes()
        assert (both.recording, both.recording_type, both.media_type) == (data, "flac", "jpg")
        assert both.meta["recording_sha256"] == hashlib.sha256(data).hexdigest() and both.meta["speech_seconds"] == 0.2
        assert contents_of(both).tasks == ("caption", "retrieval", "transcript")
        assert (spoken.media, spoken.recording_type, spoken.text) == (None, "opus", "words")
        assert "sha256" not in spoken.meta and "width" not in spoken.meta
        assert (contents_of(spoken).tasks, contents_of(spoken).problems) == (("transcript",), ())

    def test_the_number_of_processes_does_not_change_the_output(self, tmp_path):
        for n, kind in enumerate([*KINDS] * 4):
            heard(tmp_path / "m" / f"{n}.{kind}", recording(kind, tones(0.1 + n / 50)))
            written(tmp_path / "m" / f"{n}.txt", f"number {n}")
            if n % 3 == 0:
                photo(tmp_path / "m" / f"{n}.jpg")
        heard(tmp_path / "m" / "3.flac", b"no sound")
        for workers in (1, 2):
            found = read(folder, "--media", tmp_path / "m")
            outcome = convert(found, tmp_path / str(workers), Settings("folder", samples_per_shard=5), 0.5, workers)
            assert outcome.written == 15 or outcome.reasons
        names = sorted(path.name for path in (tmp_path / "1").iterdir())
        assert len(names) >= 5 and names == sorted(path.name for path in (tmp_path / "2").iterdir())
        assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in names)


class TestTable:
    def test_columns(self, tmp_path):
        photo(tmp_path / "a.jpg"), heard(tmp_path / "r" / "a.flac"), heard(tmp_path / "r" / "b.flac")
        rows = [
            {"file": "a.jpg", "recording": "./r/a.flac", "text": "a dog", "transcript": " look,  a dog "},
            {"file": "a.jpg", "recording": "r/b.flac", "text": "dogs", "transcript": "no"},
            {"file": "", "recording": "r/b.flac", "text": None, "transcript": "words"},
            {"file": "a.jpg", "recording": None, "text": "a puppy"},
            {"recording": "", "text": "of nothing"},
        ]
        table = written(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
        found = read(folder, "--media", tmp_path, "--table", table)
        assert [(record.identifier, record.has, record.captions) for record in found] == [
            ("a.jpg", ("image", "speech"), ["a dog", "dogs", "a puppy"]),
            ("r/b.flac", ("speech",), [None]),
            ("t.jsonl line 5", ("image",), []),
        ]
        assert found[0].recording == tmp_path / "r" / "a.flac"
        assert found[2].problem == f"no file: {table}, line 5: 'file' and 'recording' are empty"
        first, second = map(checked, found[:2])
        assert (first.meta["transcript"], first.meta["tasks"]) == (
            "look, a dog",
            ["caption", "retrieval", "transcript"],
        )
        assert (second.text, second.meta["tasks"], second.media) == ("words", ["transcript"], None)

    def test_a_table_of_recordings_alone_and_columns_of_other_names(self, tmp_path):
        heard(tmp_path / "a.flac")
        table = written(tmp_path / "t.csv", "path,sentence\na.flac,the words\n")
        options = ["--map", "recording=path", "--map", "transcript=sentence"]
        (record,) = read(folder, "--media", tmp_path, "--table", table, *options)
        assert (record.identifier, record.has, record.meta) == ("a.flac", ("speech",), {"transcript": "the words"})
        (record,) = read(folder, "--media", tmp_path, "--table", table, *options[:2], "--map", "text=sentence")
        assert checked(record).meta["tasks"] == ["transcript"]
        table = written(tmp_path / "t.csv", "path,sentence\na,the words\n")  # a name without its ending
        assert read(folder, "--media", tmp_path, "--table", table, *options)[0].recording == tmp_path / "a.flac"
        with pytest.raises(DataError, match=r"--map recording=spoken: no column 'spoken' in "):
            read(folder, "--media", tmp_path, "--table", table, "--map", "recording=spoken")

    def test_what_a_row_cannot_name(self, tmp_path):
        photo(tmp_path / "m" / "a.jpg"), heard(tmp_path / "secret.flac"), heard(tmp_path / "m" / "b.flac")
        rows = [
            {"file": "a.jpg", "recording": "../secret.flac", "text": "x"},
            {"recording": str(tmp_path / "secret.flac"), "text": "x"},
            {"file": "b.flac", "text": "x"},
            {"recording": "d.flac", "text": "x", "transcript": ["words"]},
            {"recording": "c.flac", "text": "x"},
            {"recording": "c", "text": ["x", "y"]},
        ]
        table = written(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
        found = read(folder, "--media", tmp_path / "m", "--table", table)
        assert list(problems(found).values()) == [
            "outside of the folder", "outside of the folder", "unknown kind", "malformed transcript",
        ]  # fmt: skip
        assert all(record.media is None and record.recording is None for record in found[:4])
        assert "name a recording of speech in the column 'recording' (--map recording=COLUMN)" in found[2].problem
        assert [checked(record).reason for record in found[4:]] == ["missing file", "no transcript"]


class TestContent:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_extension_follows_from_the_content(self, tmp_path, kind):
        data = recording(kind)
        found = checked(alone(heard(tmp_path / "a.bin", data)))
        assert (found.recording, found.recording_type, found.meta["speech_seconds"]) == (data, kind, 1.0)

    def test_ogg_is_opus_whatever_is_in_it(self, tmp_path):
        data = encoded(tones(), 16_000, "flac", "ogg")
        found = checked(alone(heard(tmp_path / "a.ogg", data)))
        assert (found.recording, found.recording_type) == (data, "opus") and len(decode_recording(data)) == 16_000

    def test_a_long_one_is_used_and_noted(self, tmp_path):
        found = checked(alone(heard(tmp_path / "a.flac", recording("flac", np.zeros(31 * 16_000, np.float32)))))
        assert (found.notes, found.meta["speech_seconds"]) == ((TOO_LONG,), 31.0)

    def test_every_bad_one_has_its_reason(self, tmp_path):
        fix = "; save it as FLAC, such as by"
        film = clip(tmp_path / "film.mp4").read_bytes()
        sound_only = encoded(tones(), 16_000, "aac", "mp4")
        bad = {
            "empty.flac": (b"", "not a FLAC, WAV, MP3 or Opus file: it is empty"),
            "text.flac": (b"a text of some words", "no sound that is known" + fix),
            "cut.flac": (recording("flac")[:9000], "recording cannot be decoded"),
            "cut.wav": (recording("wav")[:9000], "it is cut short; copy or download it again"),
            "film.flac": (film, "a container of videos (mov)" + fix),
            "sound.flac": (sound_only, "a container of videos (mov)" + fix),
            "sound.m4a": (sound_only[:8] + b"M4A " + sound_only[12:], "M4A" + fix),
            "a.aiff": (encoded(tones(), 16_000, "pcm_s16be", "aiff"), "AIFF" + fix),
            "a.aac": (encoded(tones(), 16_000, "aac", "adts"), "AAC" + fix),
            "a.caf": (encoded(tones(), 16_000, "pcm_s16le", "caf"), "CAF" + fix),
            "a.wma": (encoded(tones(), 16_000, "pcm_s16le", "asf"), "WMA" + fix),
        }
        for name, (data, message) in bad.items():
            found = checked(alone(heard(tmp_path / name, data)))
            assert found.reason == "unreadable recording" and message in found.detail, (name, found)
            assert str(tmp_path / name) in found.detail
        photo(tmp_path / "photo.jpg")
        beside = Record("photo", "image", tmp_path / "photo.jpg", ["x"], recording=tmp_path / "cut.wav")
        assert checked(beside).reason == "unreadable recording"

    def test_foreign_sound_with_a_text_is_named_and_not_passed_over(self, tmp_path):
        heard(tmp_path / "a.aiff", encoded(tones(), 16_000, "pcm_s16be", "aiff")), written(tmp_path / "a.txt", "words")
        clip(tmp_path / "b.mov"), written(tmp_path / "b.txt", "a film")
        found = read(folder, "--media", tmp_path)
        assert [record.has for record in found] == [("speech",), ("video",)] and not problems(found)
        assert checked(found[0]).reason == "unreadable recording"

    @pytest.mark.parametrize("kind", KINDS)
    def test_mutated_files_are_used_or_refused(self, tmp_path, kind):
        """250 of every kind."""
        rng = np.random.default_rng([*b"recording", *kind.encode()])
        sound, path, refused = recording(kind, tones(0.3)), tmp_path / f"a.{kind}", 0
        for _ in range(250):
            path.write_bytes(corrupted_bytes(rng, sound))
            found = checked(alone(path))
            if isinstance(found, Checked):
                assert found.recording == path.read_bytes() and found.recording_type in KINDS
                assert found.meta["speech_seconds"] > 0 or found.meta["speech_seconds"] is None
            else:
                refused += 1
                assert found.reason == "unreadable recording" and "Traceback" not in found.detail
        assert 10 < refused < 250

    def test_noise_behind_the_first_bytes(self, tmp_path):
        noise = random.Random(1)
        for head in (b"fLaC", b"RIFF\0\1\0\0WAVE", b"OggS\0\2", b"ID3\4\0\0\0\0\0\0", b"\xff\xfb"):
            for size in (0, 1, 30, 1000):
                found = checked(alone(heard(tmp_path / "a.flac", head + noise.randbytes(size))))
                assert isinstance(found, Checked) or found.reason == "unreadable recording"
