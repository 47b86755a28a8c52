"""The page of an evaluation as a tree of tags: well-formed, escaped, complete, and without anything from elsewhere."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from dsmoe_vl.report.charts import importance_chart, load_map
from dsmoe_vl.report.content import ExpertLoad, FolderExamples, Report
from dsmoe_vl.report.page import render
from dsmoe_vl.report.scores import metric_tables
from dsmoe_vl.report.text import flat, magnitude, said, short_name
from tests.support.reports import FOLDERS, Page, made_up, without

SECTIONS = ["metrics", "captions", "retrieval", "summaries", "routing", "plan"]


@pytest.fixture(scope="module", params=[8, 512], ids=["few experts", "many experts"])
def html(request):
    return render(made_up(experts=request.param))


def test_text_from_data_stays_text(html):
    page = Page(html)
    known = (
        "html head meta link title style body header h1 h2 h3 h4 p nav a main section div table thead tbody tr th td "
        "article img span dl dt dd ol li figure figcaption i br wbr strong svg path rect text details summary pre"
    )
    drawn = {"image"} if "<image" in html else {"g"}
    assert {tag for tag, _ in page.tags} == set(known.split()) | drawn
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.words().count("<script>alert(1)</script>") > 20
    assert "\x00" not in html and not re.search("[\ud800-\udfff]", html)
    html.encode()


def test_nothing_comes_from_elsewhere(html):
    page = Page(html)
    pictures = [attributes["src"] for attributes in page.named("img")]
    pictures += [attributes["href"] for attributes in page.named("image")]
    assert len(pictures) > 20
    for address in pictures:
        kind, _, encoded = address.partition(";base64,")
        assert kind in ("data:image/jpeg", "data:image/png")
        Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))).load()
    assert [attributes["href"] for attributes in page.named("link")] == ["data:,"]
    assert all(attributes["href"].startswith("#") for attributes in page.named("a"))
    assert {name for _, attributes in page.tags for name in attributes} & {"src", "srcset", "action", "data"} == {"src"}
    style = page.words("style")
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    policy = next(tag["content"] for tag in page.named("meta") if tag.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_every_section_has_a_title_and_a_link(html):
    page = Page(html)
    assert [section["id"] for section in page.named("section")] == SECTIONS
    assert [link["href"] for link in page.named("a")] == [f"#{name}" for name in SECTIONS]
    assert all(picture["alt"] for picture in page.named("img"))
    assert "width=device-width" in html


def test_what_is_told_of_examples():
    words = Page(render(made_up("ATTACK"))).words()
    assert words.count("✓ right") == 3 and words.count("✗ wrong") == 3  # a caption and two pictures; two and a summary
    assert "right one in place 2 of 1,000" in words
    assert "right one in place 17 of 5,000, with 0.250: “ATTACK”" in words
    assert "annotated, mean of 20 annotators" in words
    assert "Shown are 5 of the 16 frames" in words and words.count(" key frame ") == 2
    assert "5.14 million parameters, 2.49 million active" in words
    assert 'data.sources[0].name = "ATTACK"' in words and "760 of 760 planned" in words
    assert "Even would be 12.5 %" in words


def test_scores_with_units_and_digits():
    report = made_up("ATTACK")
    page = Page(metric_tables(report.scores))
    rows = page.words()
    assert "name every object's colour and shape, % 97.2 –" in rows
    assert "samples captioned 1,200 100" in rows
    assert "CIDEr 1.235 –" in rows and "ATTACK – not a number" in rows
    assert "picture to text: right one found first (R@1), % 92.5" in rows
    assert "COCO 5k test, text to picture: median place of the right one 3" in rows
    assert [head["title"] for head in page.named("th") if head.get("title") in FOLDERS].count(FOLDERS[0]) == 2


def test_parts_that_are_missing_have_no_section():
    nothing = Report("run", 0, {}, {}, None, {})
    assert [section["id"] for section in Page(render(nothing)).named("section")] == ["plan"]
    report = without(made_up(), load=None, examples={FOLDERS[0]: FolderExamples()})
    assert [section["id"] for section in Page(render(report)).named("section")] == ["metrics", "plan"]


def test_curve_of_one_frame_and_of_a_long_video():
    board = made_up().examples[FOLDERS[1]].storyboards[0]
    one = np.zeros(1, np.float32)
    for seconds, importance, keys in ((one, one, [0]), (np.linspace(0, 5000, 500), np.linspace(-1, 2, 500), [0, 499])):
        chart = importance_chart(without(board, seconds=seconds, importance=importance, key_frames=keys, frames={}))
        heights = [float(height) for height in re.findall(r"[ML][\d.]+ ([\d.-]+)", chart)]
        assert heights and min(heights) >= 0 and max(heights) <= 100
        assert len(Page(chart).named("span")) <= 3 + 7


@pytest.mark.parametrize("experts", [2, 8, 64, 1024])
def test_map_of_loads(experts):
    shares = np.random.default_rng(0).random((2, experts))
    page = Page(load_map(shares, float(shares.max()), [1, 3], [experts, experts // 2], "loads"))
    cells = [cell for cell in page.named("rect") if cell["class"] == "cell"]
    if experts == 1024:
        assert not cells and len(page.named("image")) == 1
    else:
        assert len(cells) == experts + experts // 2  # a narrower layer has empty places
        assert float(cells[0]["fill-opacity"]) == pytest.approx(shares[0, 0] / shares.max(), abs=1e-3)
        assert f"layer 1, expert 0: {100 * shares[0, 0]:.1f} %" in page.words("title")
    assert "layer 3" in page.words("text")


def test_shares_of_a_task_without_tokens_are_left_out():
    load = np.zeros((1, 3, 3, 4))
    load[0, 0, 1] = [3, 1, 0, 0]
    page = Page(render(without(made_up(), load=ExpertLoad(load, [0], [4]))))
    titles = [text for name, text in page.text if name == "figcaption" and "assignments" in text]
    assert titles == [f"{name}: 4 assignments a layer" for name in ("all tokens", "captions", "images")]
    assert page.words("text").count("75") == 3


def test_words():
    assert said("<a href='x'>&\x1b") == "&lt;a href=&#x27;x&#x27;&gt;&amp;�"
    assert [short_name(name, ["a/x", "b/x", "http://h/y/"]) for name in ("a/x", "b/x", "http://h/y/")] == [
        "a/x",
        "b/x",
        "y",
    ]
    assert [magnitude(number) for number in (950, 5144915, 2.5e9)] == ["950", "5.14 million", "2.5 billion"]
    assert list(flat({"a": {"b": 1, "c": []}, "d": [{"e": "x"}]})) == ["a.b = 1", "a.c = []", 'd[0].e = "x"']
