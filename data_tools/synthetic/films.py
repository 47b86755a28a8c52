"""Videos of the synthetic world: shapes enter, rest, change colour or collide. Every frame is annotated.

An event happens at the first frame that shows it.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from PIL import Image

from data_tools.synthetic.scenes import COLOURS, Combination, article, background, combinations, on_grid, paint

FRAMES_PER_SECOND = 8
FRAME_COUNT = (20, 28)  # least and greatest
CELLS = 8  # of the grid that shapes move on
DIAMETER = 4  # cells across
SIDES = {"right": "left", "left": "right", "down": "top", "up": "bottom"}  # motion -> side of entry
VECTORS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
# Importance of each kind of event, and of frames without an event.
WEIGHTS = {"enters": 0.6, "stops": 0.5, "turns": 1.0, "collide": 1.0}
IDLE, MOVING = 0.1, 0.3
EVENT_SPREAD_SECONDS = 0.25


@dataclass(frozen=True)
class Stage:
    """Size and number of the frames of a video."""

    size: int  # pixels, width and height
    frames: int

    @property
    def cell(self) -> int:
        return self.size // CELLS

    @property
    def diameter(self) -> int:
        return DIAMETER * self.cell

    @property
    def duration_seconds(self) -> float:
        return self.frames / FRAMES_PER_SECOND

    @property
    def times(self) -> list[float]:
        return [i / FRAMES_PER_SECOND for i in range(self.frames)]


@dataclass
class Actor:
    """A moving shape. Its centre (x and y in pixels) moves from `start` to `end` between `start_seconds` and
    `stop_seconds`; its colour is `becomes` from `turn_seconds` on. `seen_seconds`: when it is first visible, and when
    it has come to rest.
    """

    shape: str
    colour: str
    motion: str
    start: tuple[float, float]
    end: tuple[float, float]
    start_seconds: float
    stop_seconds: float
    seen_seconds: tuple[float, float] = (0.0, 0.0)
    becomes: str | None = None
    turn_seconds: float = math.inf

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"

    def centre(self, seconds: float) -> tuple[float, float]:
        progress = min(1.0, max(0.0, (seconds - self.start_seconds) / (self.stop_seconds - self.start_seconds)))
        return (
            self.start[0] + progress * (self.end[0] - self.start[0]),
            self.start[1] + progress * (self.end[1] - self.start[1]),
        )

    def moves(self, seconds: float) -> bool:
        return self.seen_seconds[0] <= seconds < self.seen_seconds[1]

    def watch(self, stage: Stage) -> None:
        """Set `seen_seconds`. A shape is drawn on a grid, so its motion is visible later than it begins."""
        corners = [on_grid(stage.diameter, self.centre(seconds), stage.cell) for seconds in stage.times]
        inside = [all(-stage.diameter < side < stage.size for side in corner) for corner in corners]
        moved = [i for i in range(1, stage.frames) if corners[i] != corners[i - 1]]
        self.seen_seconds = stage.times[inside.index(True)], stage.times[moved[-1]]

    def attributes(self) -> dict[str, str]:
        known = {"shape": self.shape, "colour": self.colour, "motion": self.motion}
        return known | {"becomes": self.becomes} if self.becomes else known


@dataclass(frozen=True)
class Event:
    """A key moment. `name` begins with a key of WEIGHTS."""

    name: str
    time_seconds: float


@dataclass(frozen=True)
class Plot:
    """The events of a video, and texts that describe them."""

    actors: list[Actor]
    events: list[Event]
    captions: list[str]
    summary: str
    content: str  # equal for films that can have a caption in common


def film(rng: np.random.Generator, held_out: bool, size: int, max_objects: int) -> tuple[bytes, dict[str, Any]]:
    """An H.264 MP4 of `size` x `size` pixels and its KEY.json values.

    The values: width, height, fps, frames, duration_seconds, captions, summary, content, `attributes` (of each actor),
    `events` (name, time_seconds) and `importance` (a number in [0, 1] per frame). Plots of two objects need
    `max_objects` >= 2.
    """
    stage = Stage(size, int(rng.integers(FRAME_COUNT[0], FRAME_COUNT[1] + 1)))
    plots = (_move, _turn, _collide)[: 2 + (max_objects > 1)]
    plot = plots[rng.integers(len(plots))](rng, combinations(list(VECTORS), held_out), stage)

    still = background(rng, size, size)
    pictures = []
    for seconds in stage.times:
        canvas = still.copy()
        for actor in plot.actors:
            colour = actor.becomes if actor.becomes and seconds >= actor.turn_seconds else actor.colour
            paint(canvas, actor.shape, colour, stage.diameter, actor.centre(seconds), stage.cell)
        pictures.append(canvas)
    return encode_mp4(pictures), {
        "width": size,
        "height": size,
        "fps": FRAMES_PER_SECOND,
        "frames": stage.frames,
        "duration_seconds": stage.duration_seconds,
        "captions": [plot.captions[i] for i in rng.permutation(len(plot.captions))],
        "summary": plot.summary,
        "content": plot.content,
        "attributes": [actor.attributes() for actor in plot.actors],
        "events": [{"name": event.name, "time_seconds": round(event.time_seconds, 3)} for event in plot.events],
        "importance": [round(_importance(plot, seconds), 3) for seconds in stage.times],
    }


def encode_mp4(pictures: list[Image.Image]) -> bytes:
    """Encode RGB pictures of one size as H.264. The same pictures give the same bytes."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # Without the macroblock tree, which below 64 pixels reads uninitialised memory: one file in a hundred would
        # have other bytes.
        options = {"preset": "veryfast", "crf": "18", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # the output depends on the number of threads
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def _move(rng: np.random.Generator, choice: list[Combination], stage: Stage) -> Plot:
    """One shape enters, crosses the picture and comes to rest near the other side."""
    combination = choice[rng.integers(len(choice))]
    start, stop = (rng.uniform(*within) * stage.duration_seconds for within in ((0.02, 0.15), (0.7, 0.9)))
    reach = stage.size - 0.5 * stage.diameter - rng.uniform(0, 0.1) * stage.size
    actor = _entering(rng, combination, stage, reach, start, stop)
    side = SIDES[actor.motion]
    enters, rests = actor.seen_seconds
    return Plot(
        [actor],
        [Event("enters", enters), Event("stops", rests)],
        [
            f"{article(str(actor))} moves {actor.motion}",
            f"there is {article(str(actor))} moving {actor.motion}",
            f"{article(str(actor))} enters from the {side} and moves {actor.motion}",
        ],
        f"{article(str(actor))} enters from the {side}, moves {actor.motion} and stops",
        f"{actor} {actor.motion}",
    )


def _turn(rng: np.random.Generator, choice: list[Combination], stage: Stage) -> Plot:
    """One shape enters, rests in the middle and changes colour."""
    combination = choice[rng.integers(len(choice))]
    becomes = str(rng.choice([colour for colour in COLOURS if colour != combination[1]]))
    start, stop, turn = (rng.uniform(low, low + 0.1) * stage.duration_seconds for low in (0.05, 0.3, 0.5))
    actor = _entering(rng, combination, stage, 0.5 * stage.size, start, stop)
    turn = math.ceil(turn * FRAMES_PER_SECOND) / FRAMES_PER_SECOND
    actor.becomes, actor.turn_seconds = becomes, turn
    enters, rests = actor.seen_seconds
    return Plot(
        [actor],
        [Event("enters", enters), Event("stops", rests), Event(f"turns {becomes}", turn)],
        [
            f"{article(str(actor))} moves {actor.motion} and turns {becomes}",
            f"there is {article(str(actor))} moving {actor.motion} and turning {becomes}",
        ],
        f"{article(str(actor))} enters from the {SIDES[actor.motion]}, stops and turns {becomes}",
        f"{actor} {actor.motion} {becomes}",
    )


def _collide(rng: np.random.Generator, choice: list[Combination], stage: Stage) -> Plot:
    """Two shapes enter from opposite sides and stop where they meet."""
    start, meet = (rng.uniform(*within) * stage.duration_seconds for within in ((0.05, 0.15), (0.55, 0.75)))
    across = rng.uniform(0.3, 0.7) * stage.size
    actors = []
    pair = (("right", "left"), ("down", "up"))[rng.integers(2)]
    of_split = int(rng.integers(2))  # the other actor is one of the training split
    for number, motion in enumerate(pair):
        pool = choice if number == of_split else combinations(list(VECTORS), False)
        fitting = [combination for combination in pool if combination[2] == motion]
        combination = fitting[rng.integers(len(fitting))]
        reach = 0.5 * (stage.size - stage.diameter)  # centres are one diameter apart: shapes touch in the middle
        actors.append(_entering(rng, combination, stage, reach, start, meet, across))
    enters, rests = zip(*(actor.seen_seconds for actor in actors), strict=True)
    first, second = (article(str(actor)) for actor in actors)
    return Plot(
        actors,
        [Event("enters", min(enters)), Event("collide", max(rests))],
        [
            f"{first} moves {pair[0]} and collides with {second}",
            f"{second} moves {pair[1]} and collides with {first}",
            f"{first} and {second} collide",
        ],
        f"{first} enters from the {SIDES[pair[0]]}, {second} from the {SIDES[pair[1]]}, and they collide",
        " ".join(sorted(str(actor) for actor in actors)),
    )


def _entering(
    rng: np.random.Generator,
    combination: Combination,
    stage: Stage,
    reach: float,
    start_seconds: float,
    stop_seconds: float,
    across: float | None = None,
) -> Actor:
    """An actor that starts just outside the picture and stops with its centre `reach` pixels inside."""
    shape, colour, motion = combination
    size, diameter = stage.size, stage.diameter
    across = across if across is not None else rng.uniform(diameter / 2, size - diameter / 2)
    dx, dy = VECTORS[motion]
    path = [-diameter / 2, reach] if dx + dy > 0 else [size + diameter / 2, size - reach]
    start, end = ((p, across) if dx else (across, p) for p in path)
    actor = Actor(shape, colour, motion, start, end, start_seconds, stop_seconds)
    actor.watch(stage)
    return actor


def _importance(plot: Plot, seconds: float) -> float:
    """The greatest importance of the moment: resting, moving, or near an event (a Gaussian around it)."""
    worth = MOVING if any(actor.moves(seconds) for actor in plot.actors) else IDLE
    for event in plot.events:
        distance = (seconds - event.time_seconds) / EVENT_SPREAD_SECONDS
        worth = max(worth, WEIGHTS[event.name.split()[0]] * math.exp(-0.5 * distance**2))
    return worth
