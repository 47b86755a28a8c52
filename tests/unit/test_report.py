"""The page of an evaluation as a tree of tags: well-formed, escaped, complete, and without anything from elsewhere."""

import base64
import io
import re

import jinja2
import numpy as np
import pytest
from PIL import Image

from dsmoe_vl.report.content import CaptionExamples, ExpertLoad, Report, ScoreLabel, Section, TaskPart
from dsmoe_vl.report.page import render
from dsmoe_vl.report.routing import _in_sentence
from dsmoe_vl.report.text import flat, magnitude, short_names
from tests.support.reports import ATTACK, FOLDERS, Page, made_up, without

SECTIONS = ["metrics", "captions", "retrieval", "summaries", "transcripts", "routing", "plan"]


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
    page = Page(render(made_up("ATTACK")))
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
    report = made_up()
    empty: dict[str, object] = {
        "caption": CaptionExamples(),
        "retrieval": [],
        "summary": [],
        "transcript": CaptionExamples(),
    }
    tasks = {name: without(part, examples={FOLDERS[0]: empty[name]}) for name, part in report.tasks.items()}
    report = without(report, load=ExpertLoad(np.zeros((1, 3, 3, 4)), [0], [4]), tasks=tasks)
    assert [section["id"] for section in Page(render(report)).named("section")] == ["metrics", "plan"]


def only(task: str, examples: object, **parts: object) -> Page:
    """A page with one folder's examples of one task and without scores."""
    report = made_up()
    part = without(report.tasks[task], examples={FOLDERS[0]: examples})
    return Page(render(without(report, **{"scores": {}, "tasks": {task: part}, "load": None, **parts})))


def test_curve_of_one_frame_and_of_a_long_video():
    (board,) = made_up().tasks["summary"].examples[FOLDERS[1]]
    one = np.zeros(1, np.float32)
    for seconds, importance, keys in ((one, one, [0]), (np.linspace(0, 5000, 500), np.linspace(-1, 2, 500), [0, 499])):
        changed = without(board, seconds=seconds, importance=importance, key_frames=keys, frames={})
        page = only("summary", [changed])
        drawn = {path["class"]: path["d"] for path in page.named("path")}
        heights = [float(height) for path in drawn.values() for height in re.findall(r"[ML][\d.]+ ([\d.-]+)", path)]
        assert heights and min(heights) >= 0 and max(heights) <= 100
        assert ("dots" in drawn) == (len(seconds) == 1)
        assert 2 <= sum("left:" in (span.get("style") or "") for span in page.named("span")) <= 7


@pytest.mark.parametrize("experts", [2, 8, 64, 1024])
def test_map_of_loads(experts):
    load = np.random.default_rng(0).integers(1, 1000, (2, 3, 3, experts)).astype(np.float64)
    load[1, ..., experts // 2 :] = 0
    load[:, 1:] = load[:, :, 1:] = 0  # all tokens are text of captions: four maps are left out
    page = only("caption", CaptionExamples(), load=ExpertLoad(load, [1, 3], [experts, experts // 2]))
    shares = load.sum((1, 2)) / load.sum((1, 2, 3))[:, None]
    cells = [cell for cell in page.named("rect") if cell["class"] == "cell"]
    if experts == 1024:
        assert not cells and len(page.named("image")) == 3
    else:
        assert len(cells) == 3 * (experts + experts // 2)  # a narrower layer has empty places
        assert float(cells[0]["fill-opacity"]) == pytest.approx(shares[0, 0] / shares.max(), abs=1e-3)
        assert f"layer 1, expert 0: {100 * shares[0, 0]:.1f} %" in page.words("title")
    assert "layer 3" in page.words("text")
    even = "Even would be 0.0977 % or 0.195 %." if experts == 1024 else f"Even would be {100 / experts:.3g} % or "
    assert even in page.words()


def test_shares_of_a_task_without_tokens_are_left_out():
    load = np.zeros((1, 3, 3, 4))
    load[0, 0, 1] = [3, 1, 0, 0]
    page = Page(render(without(made_up(), load=ExpertLoad(load, [0], [4]))))
    titles = [text for name, text in page.text if name == "figcaption" and "assignments" in text]
    assert titles == [f"{name}: 4 assignments a layer" for name in ("all tokens", "captions", "images")]
    assert page.words("text").count("75") == 3


def test_a_task_that_nobody_knows(tmp_path):
    """It brings its own section, whose template may use the page's macros; all that it says stays text."""
    template = tmp_path / "poems.html"
    template.write_text(
        """{% from "macros.html" import passage %}
        {% for name, poems in folders %}<h3>{{ name }}</h3>{% for poem in poems %}<p>{{ passage(poem) }}</p>{% endfor %}
        {% endfor %}"""
    )
    poem = TaskPart(
        f"Poems {ATTACK}",
        {"rhymes": ScoreLabel(f"rhymes {ATTACK}, %", "percent")},
        Section("poems", f"Poems as they came {ATTACK}", template),
        {"somewhere/else": [f"roses {ATTACK}", ""], "somewhere/nothing": []},
    )
    scores = {"somewhere/else": {"poem": {"rhymes": 0.5, "line_count": 1234.0, f"_{ATTACK}": 0.25}}}
    report = Report("run", 0, scores, {"poem": poem}, None, {})
    page = Page(render(report))
    assert [section["id"] for section in page.named("section")] == ["metrics", "poems", "plan"]
    assert [link["href"] for link in page.named("a")] == ["#metrics", "#poems", "#plan"]
    assert not page.named("script") and not page.named("img")
    assert page.words("h2").startswith("Scores by task and folder Poems as they came")
    assert (
        page.words("h3").startswith("Poems ") and page.words("h3").endswith(" else") and "nothing" not in page.words()
    )
    assert "line count 1,234" in page.words() and page.words("td").startswith("50.0 1,234 0.250")
    assert page.words("p").count("roses") == 1 and "(empty)" in page.words("span")


def test_a_task_without_a_section_shows_its_scores():
    poem = TaskPart("Poems", {"rhymes": ScoreLabel("rhymes, %", "percent")}, examples={"folder": ["roses"]})
    scores = {"folder": {"poem": {"rhymes": 0.5}, "unheard_of": {"samples": 3, "tone_error": 0.5}}}
    page = Page(render(Report("run", 0, scores, {"poem": poem}, None, {})))
    assert [section["id"] for section in page.named("section")] == ["metrics", "plan"]
    assert "Poems" in page.words("h3") and "rhymes, % 50.0" in page.words()
    assert "unheard_of" in page.words("h3") and "samples 3 tone error 0.500" in page.words()  # not even a part
    assert "roses" not in page.words()


@pytest.mark.parametrize("text", ["{{ folder }}", "{{ folders[0][1].captions }}", "{% if boards %}b{% endif %}"])
def test_a_template_with_an_unknown_name_fails(tmp_path, text):
    template = tmp_path / "section.html"
    template.write_text(text)
    part = TaskPart("Task", {}, Section("task", "Task", template), {"folder": ["example"]})
    with pytest.raises(jinja2.UndefinedError):
        render(Report("run", 0, {}, {"task": part}, None, {}))


def test_loads_are_named_as_their_tasks_are():
    words = Page(render(made_up())).words("figcaption")
    assert "captions: " in words and "retrieval: " in words and "video summaries: " in words
    assert _in_sentence("COCO captions") == "COCO captions"


def test_words():
    page = Page(render(Report("<a href='x'>&\x1b", 0, {}, {}, None, {})))
    assert page.words("h1") == page.words("title") == "Evaluation of <a href='x'>&�"
    assert list(short_names(["a/x", "b/x", "http://h/y/"]).values()) == ["a/x", "b/x", "y"]
    assert [magnitude(number) for number in (950, 5144915, 2.5e9)] == ["950", "5.14 million", "2.5 billion"]
    assert list(flat({"a": {"b": 1, "c": []}, "d": [{"e": "x"}]})) == ["a.b = 1", "a.c = []", 'd[0].e = "x"']
