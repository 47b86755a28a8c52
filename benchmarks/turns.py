"""Things that are compared take turns, so that a busy machine slows down all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


class Interleaved:
    """Things that take turns; the figures of each are the work it did a second."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.figures: dict[str, dict[str, float]] = {}

    def run(self, things: dict[str, Callable[[int], int]], samples: int, lead: int = 0) -> dict[str, list[float]]:
        """Each thing handles so many samples, or some more, and returns how many. Samples a second, by thing and turn.

        `lead`: samples before those that are timed, in which it uses up what it has made ahead during other turns, and
        these fill their buffers.
        """
        found: dict[str, list[float]] = {name: [] for name in things}
        for turn in range(self.repeats + 1):
            for name, thing in things.items():
                if lead:
                    thing(lead)
                start = time.perf_counter()
                handled = thing(samples)
                if turn:  # the first fills caches
                    found[name].append(handled / (time.perf_counter() - start))
        width = max(map(len, found))
        for name, rates in found.items():
            median = statistics.median(rates)
            print(f"  {name:<{width}}  {median:8.0f} samples/s   ({min(rates):.0f} to {max(rates):.0f})", flush=True)
            self.figures[name] = {"samples_per_second": median, "least": min(rates), "most": max(rates)}
        return found


def ratio(title: str, ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios turn by turn, printed."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"  {title}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
    return statistics.median(ratios)
