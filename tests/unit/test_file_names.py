"""What a file is, its content decides: no name is refused or passed over without a word."""

from __future__ import annotations

import io
import string
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_tools.convert import main
from data_tools.formats import folder, img2dataset, video_path
from dsmoe_vl.config.recipe import DataConfig, SourceConfig
from dsmoe_vl.data.decode import decode_image, decode_video
from dsmoe_vl.data.folder_walk import files_below
from dsmoe_vl.data.foreign_media import stored
from dsmoe_vl.data.media_kind import HEAD, container, media_kind
from dsmoe_vl.data.shards.index import iterate_samples
from dsmoe_vl.errors import DataError
from dsmoe_vl.inference.media import open_media
from tests.support.datasets import clip, photo, read, written
from tests.support.sound_files import recording
from tests.support.tars import encoded_as, picture, write_tar

PICTURE = picture()
PIXELS = np.asarray(PICTURE)


def animated(kind: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "green")]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


def film(form: str, codec: str = "libx264") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=form) as output:
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(12):
            output.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48), (20 * i,) * 3))))
        output.mux(stream.encode())
    return file.getvalue()


IMAGES = {
    "gif": encoded_as(PICTURE.quantize(), "GIF"),
    "bmp": encoded_as(PICTURE, "BMP"),
    "tif": encoded_as(PICTURE, "TIFF"),
    "tiff": encoded_as(PICTURE, "TIFF", compression="tiff_lzw"),
    "avif": encoded_as(PICTURE, "AVIF", quality=100, subsampling="4:4:4"),
    "jp2": encoded_as(PICTURE, "JPEG2000"),
}
KEPT = {"jfif": ("JPEG", "jpg"), "PNG": ("PNG", "png"), "image": ("WEBP", "webp"), "dat": ("JPEG", "jpg")}
FILMS = {  # by name: container, codec, and the extension in shards
    "MOV": ("mov", "libx264", "mp4"),
    "m4v": ("ipod", "libx264", "mp4"),
    "3gp": ("3gp", "libx264", "mp4"),
    "mkv.bak": ("matroska", "libx264", "mkv"),
    "ts": ("mpegts", "libx264", "mkv"),
    "flv": ("flv", "libx264", "mkv"),
    "mpg": ("vob", "mpeg2video", "mkv"),
    "wmv": ("asf", "msmpeg4", "mkv"),
    "flv1": ("flv", "flv1", "avi"),
    "wmv1": ("asf", "wmv1", "avi"),
    "wmv2": ("asf", "wmv2", "avi"),
    "film": ("webm", "libvpx-vp9", "webm"),
}


def convert(*options: object) -> int:
    return main([str(option) for option in ("folder", *options)])


class TestContent:
    @pytest.mark.parametrize("name", IMAGES)
    def test_images_of_other_formats_become_png(self, name):
        made = stored(IMAGES[name])
        assert made.extension == "png" and made.note.endswith("stored as PNG") and media_kind(IMAGES[name]) == "image"
        theirs = np.asarray(Image.open(io.BytesIO(IMAGES[name])).convert("RGB"))
        np.testing.assert_array_equal(decode_image(made.data), theirs)
        if name in ("bmp", "tif", "tiff", "jp2"):
            np.testing.assert_array_equal(decode_image(made.data), PIXELS)

    def test_of_an_animation_the_first_picture(self):
        made = stored(animated("GIF"))
        assert made.note == "first of several pictures in a GIF stored as PNG"
        assert decode_image(made.data)[0, 0].tolist() == [255, 0, 0]
        for kind in ("WEBP", "PNG"):  # keep their bytes
            assert stored(animated(kind)).data == animated(kind)
            np.testing.assert_allclose(decode_image(animated(kind))[0, 0], (255, 0, 0), atol=3)

    @pytest.mark.parametrize("name", FILMS)
    def test_films(self, name):
        form, codec, extension = FILMS[name]
        data = film(form, codec)
        made = stored(data)
        assert made.extension == extension and media_kind(data) == "video"
        assert (made.data == data) == (form not in ("mpegts", "flv", "vob", "asf")) == (not made.note)
        assert stored(data).data == made.data  # no random number, no time
        frames = decode_video(made.data, 100)
        assert 11 <= len(frames) <= 12
        np.testing.assert_allclose([f.mean() for _, f in frames][:3], [0, 20, 40], atol=12)

    def test_what_is_neither(self):
        for data in (
            b"",
            b"BM is a text",
            b"RIFF1234WAVEfmt ",
            b"OggS",
            b"\0" * 600,
            b"#EXTM3U\n",
            b"ffconcat version 1.0",
        ):
            assert media_kind(data) is None
            assert stored(data).extension == ""
        sound = io.BytesIO()
        with av.open(sound, "w", format="ipod") as output:
            output.add_stream("aac", rate=8000, layout="mono")
        assert media_kind(sound.getvalue()[:HEAD]) is None  # an .m4a beside a film is not a film
        for text in (b"G" * 1000, b"GOOD"):
            assert container(text) in (None, "mpegts")

    def test_formats_that_are_known_but_not_read(self, tmp_path):
        heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
        assert media_kind(heic) == "image"
        with pytest.raises(DataError, match="HEIC is not supported; save it as a JPEG"):
            stored(heic)


class TestConversion:
    def test_every_name_is_used(self, tmp_path, capsys):
        media, expected = tmp_path / "media", {}
        media.mkdir()
        for name, data in IMAGES.items():
            (media / f"i_{name}.{name}").write_bytes(data)
            expected[f"i_{name}"] = "png"
        for name, (kind, extension) in KEPT.items():
            (media / f"k_{name}.{name}").write_bytes(encoded_as(PICTURE, kind))
            expected[f"k_{name}"] = extension
        for name, (form, codec, extension) in FILMS.items():
            stem = f"f_{name.split('.')[0]}"
            (media / f"{stem}.{name}".replace("mkv.bak", "bak")).write_bytes(film(form, codec))
            expected[stem] = extension
        (media / "none").write_bytes(encoded_as(PICTURE, "JPEG"))
        expected["none"] = "jpg"
        (media / "wrong.mp4").write_bytes(encoded_as(PICTURE, "PNG"))
        expected["wrong"] = "png"
        for stem in expected:
            (media / f"{stem}.{'TXT' if stem == 'f_MOV' else 'txt'}").write_text("a caption")
        for workers in ("1", "2"):
            options = ["--media", media, "--output", tmp_path / workers, "--samples-per-shard", 8, "--workers", workers]
            assert convert(*options, "--max-rejected", 0) == 0
            out = capsys.readouterr().out
            assert f"wrote {len(expected)} samples" in out and "rejected: none" in out and "not used: " not in out
            assert (
                "1 GIF stored as PNG" in out and "2 TIFF stored as PNG" in out and "1 MPEG-TS stored as Matroska" in out
            )
            assert "1 image by its content, not by its name" in out
        for path in (tmp_path / "1").iterdir():
            assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name
        found = {sample.meta["id"].split(".")[0]: sample for sample in iterate_samples(SourceConfig.at(tmp_path / "1"))}
        assert {stem: sample.media_type for stem, sample in found.items()} == expected
        assert found["f_MOV"].media == (media / "f_MOV.MOV").read_bytes() and found["f_MOV"].is_video

    def test_in_a_table(self, tmp_path):
        for name, data in (("a.GIF", IMAGES["gif"]), ("b.MOV", film("mov")), ("c", encoded_as(PICTURE, "PNG"))):
            (tmp_path / name).write_bytes(data)
        written(tmp_path / "notes.html", "<p>")
        table = written(tmp_path / "t.csv", "file,text\na.GIF,x\nb.MOV,x\nc,x\nnotes.html,x\nmissing.gif,x\n")
        assert convert("--media", tmp_path, "--table", table, "--output", tmp_path / "s", "--max-rejected", 0.5) == 0
        found = iterate_samples(SourceConfig.at(tmp_path / "s"))
        assert [sample.media_type for sample in found] == ["png", "mp4", "png"]
        found = (tmp_path / "s" / "rejected.jsonl").read_text()
        assert '"unknown kind"' in found and '"missing file"' in found

    def test_names_without_endings_in_a_table(self, tmp_path):
        jpeg, sound = encoded_as(PICTURE, "JPEG"), recording()
        files = {
            "IMG_0001.MOV": film("mov"), "a3.gif": IMAGES["gif"], "sub/e1.JPG": jpeg, "b5.JPE": jpeg, "d": jpeg,
            "a6.avif": IMAGES["avif"], "a8.ts": film("mpegts"), "c.1.webp": encoded_as(PICTURE, "WEBP"), "e.jpg": jpeg,
            "e.GIF": IMAGES["gif"], "f.txt": b"a text", "g.html": b"<p>", "h.flac": sound, "i.OGG": recording("opus"),
        }  # fmt: skip
        for name, data in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
        expected = {Path(name).with_suffix("").as_posix(): name for name in files if name != "e.GIF"}
        expected |= {name: name for name in ("f", "g", "gone")}  # neither images nor videos
        rows = [f",{name},x" if name in "hi" else f"{name},,x" for name in expected]
        table = written(tmp_path / "t.csv", "\n".join(["file,recording,text", *rows]))
        found = read(folder, "--media", tmp_path, "--table", table)
        paths = {record.identifier: record.media or record.recording for record in found}
        assert {name: path.relative_to(tmp_path).as_posix() for name, path in paths.items()} == expected
        assert [record.identifier for record in found if record.kind == "video"] == ["IMG_0001", "a8"]

    def test_links_to_folders(self, tmp_path, capsys):
        for name in ("in/a", "in/sub/b", "out/c", "out/deep/d"):
            photo(tmp_path / f"{name}.jpg")
            written(tmp_path / f"{name}.txt", "a photo")
        inside = tmp_path / "in"
        for link, target in (
            ("outside", "../out"), ("again", "../out/deep"), ("loop", "."), ("up", ".."), ("sub2", "sub"),
            ("sub/back", "../../in"), ("gone", "../nothing"),
        ):  # fmt: skip
            (inside / link).symlink_to(target)
        (tmp_path / "out" / "self").symlink_to(".")
        (inside / "file.jpg").symlink_to("../out/c.jpg")
        written(inside / "file.txt", "a photo")
        assert convert("--media", inside, "--output", tmp_path / "s", "--max-rejected", 0) == 0
        out = capsys.readouterr().out
        found = [sample.meta["id"] for sample in iterate_samples(SourceConfig.at(tmp_path / "s"))]
        assert found == ["a.jpg", "again/d.jpg", "file.jpg", "outside/c.jpg", "sub/b.jpg"]
        assert "3 a link to a folder that is read already (outside/deep, outside/self, sub2)" in out
        assert "3 a link to a folder around it (loop, sub/back, up)" in out and "1 a link to nothing (gone)" in out

    def test_what_is_not_used_is_counted_and_named(self, tmp_path, capsys):
        photo(tmp_path / "m" / "a.jpg")
        written(tmp_path / "m" / "a.txt", "a photo")
        for name in ("a.json", "README", "x/style.css", "x/more.css"):
            written(tmp_path / "m" / name, "{}")
        (tmp_path / "m" / "a.xmp").write_bytes(b"")
        (tmp_path / "m" / "lonely.gif").write_bytes(IMAGES["gif"])
        photo(tmp_path / "m" / "._a.jpg")
        assert convert("--media", tmp_path / "m", "--output", tmp_path / "s", "--max-rejected", 0) == 0
        assert (
            "not used: 5 neither an image nor a video (README, a.json, a.xmp, ...), 1 hidden (._a.jpg), "
            "1 image without a text file (lonely.gif)\n" in capsys.readouterr().out
        )

    def test_videos_named_by_annotations(self, tmp_path):
        for name in ("a.MOV", "b.m4v", "c.3gp", "d"):
            clip(tmp_path / name)
        written(tmp_path / "e.MP4.part", "unfinished")
        clip(tmp_path / "f.mp4")
        clip(tmp_path / "f.MOV")
        found = {name: video_path(tmp_path, name).name for name in "abcdef"}
        assert found == {"a": "a.MOV", "b": "b.m4v", "c": "c.3gp", "d": "d", "e": "e.mp4", "f": "f.mp4"}
        clip(tmp_path / "e.mov")
        assert video_path(tmp_path, "e").name == "e.mov"

    def test_images_in_tars(self, tmp_path):
        members = [("1.json", b"{}"), ("1.txt", b"a"), ("1.gif", IMAGES["gif"]), ("2.html", b"<p>"), ("2.txt", b"b")]
        write_tar(tmp_path / "00000.tar", members)
        first, second = read(img2dataset, "--shards", tmp_path)
        assert first.media.read_bytes() == IMAGES["gif"] and second.problem.startswith("no image")


class TestInference:
    def test_folders(self, tmp_path, capsys):
        for name, data in (
            ("a.GIF", IMAGES["gif"]),
            ("b.MOV", film("mov")),
            ("c", IMAGES["tif"]),
            ("d.ts", film("mpegts")),
        ):
            (tmp_path / "m").mkdir(exist_ok=True)
            (tmp_path / "m" / name).write_bytes(data)
        written(tmp_path / "m" / "notes.md", "# notes")
        photo(tmp_path / "other" / "e.jpg")
        (tmp_path / "m" / "link").symlink_to(tmp_path / "other")
        (tmp_path / "m" / "loop").symlink_to(tmp_path / "m")
        found = [item.read() for item in open_media(str(tmp_path / "m"), DataConfig())]
        assert [sample.is_video for sample in found] == [False, True, False, True, False]
        for sample in found:
            assert (decode_video(sample.media, 1)[0][1] if sample.is_video else decode_image(sample.media)).size
        said = capsys.readouterr().err
        assert "not used: 1 a link to a folder around it (loop), 1 neither an image nor a video (notes.md)" in said


def test_mutated_names(tmp_path):
    """Any file name with any content: no error, and every file is a record or named as not used."""
    rng = np.random.default_rng(11)
    contents = [
        *IMAGES.values(),
        encoded_as(PICTURE, "JPEG"),
        film("mov"),
        b"",
        b"text",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"BM",
    ]
    endings = [
        "jpg",
        "JPEG",
        "mov",
        "txt",
        "TXT",
        "tar.gz",
        "",
        ".",
        "mp4.",
        "gif",
        "\u00e9",
        "j p g",
        "json",
        "aé\u0301",
    ]
    letters = [*string.ascii_letters, *" .-_'\"\\$*?[]{}%#&;|<>`~\t\n", "é", "日", "\u202e", "\udcff"]
    names: Counter[str] = Counter()
    for number in range(300):
        stem = "".join(rng.choice(letters, int(rng.integers(1, 9)))) + str(number % 150)
        name = f"{stem}.{rng.choice(endings)}"
        try:
            path = tmp_path / "m" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(contents[int(rng.integers(len(contents)))])
        except (OSError, ValueError):
            continue
        names[name] += 1
        if rng.random() < 0.5:
            path.with_suffix(".txt").write_text("a caption")
    found = read(folder, "--media", tmp_path / "m")
    files, passed = files_below(tmp_path / "m")
    assert len(found) > 60
    unused = folder.unused(type("Arguments", (), {"table": None, "media": tmp_path / "m"}))
    assert unused.count("(") >= 2 and len(files) + len(passed) >= len(names)
    status = convert("--media", tmp_path / "m", "--output", tmp_path / "s", "--max-rejected", 1, "--workers", 1)
    assert status == 0
    assert len(list(iterate_samples(SourceConfig.at(tmp_path / "s")))) > 30
