"""When a caption counts as right."""

import pytest

from dsmoe_vl.config.recipe import SourceConfig
from dsmoe_vl.data.sample import Sample
from dsmoe_vl.evaluation.texts import names_every_object

RED_CIRCLE, BLUE_RING = {"colour": "red", "shape": "circle"}, {"colour": "blue", "shape": "ring"}


@pytest.mark.parametrize(
    ("text", "attributes", "right"),
    [
        ("a small red circle", [RED_CIRCLE], True),
        ("there is a Red circle.", [RED_CIRCLE], True),
        ("a red ring left of a blue circle", [RED_CIRCLE, BLUE_RING], False),
        ("a blue ring left of a red circle", [RED_CIRCLE, BLUE_RING], True),
        ("a red circle", [RED_CIRCLE, BLUE_RING], False),
        ("a red circle above a red circle", [RED_CIRCLE, RED_CIRCLE], True),
        ("a red circle", [RED_CIRCLE, RED_CIRCLE], False),
        ("a dark red circle", [RED_CIRCLE], True),
        ("an infrared circle", [RED_CIRCLE], False),
        ("", [RED_CIRCLE], False),
    ],
)
def test_every_object_must_be_named(text, attributes, right):
    assert names_every_object(text, sample(attributes)) is right


@pytest.mark.parametrize(
    "attributes",
    [None, [], "red", 3, ["red"], [3], [None], [{"colour": "red"}], {"colour": "red", "shape": "circle"}],
)
def test_attributes_of_other_datasets_are_no_truth(attributes):
    assert names_every_object("a red circle", sample(attributes)) is None


def test_colours_and_shapes_are_plain_text():
    assert names_every_object("a circle", sample([{"colour": "(", "shape": "circle"}])) is False


def sample(attributes: object) -> Sample:
    return Sample("1", SourceConfig("a"), 0, None, "", "", {"attributes": attributes})
