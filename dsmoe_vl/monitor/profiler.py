"""A profiler's trace of a few steps, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class StepProfiler:
    """Profiles this rank from the first to the last of the named steps; without names, nothing.

    The file is called `trace_stepFIRST_rankRANK.json.gz`. Sparse layers show their phases as `moe/...`; the time of an
    all-to-all is seen here and not logged, because timing every call would make the host wait for the accelerator.
    """

    def __init__(self, run_dir: Path, steps: tuple[int, ...], rank: int) -> None:
        self._steps, self._path = steps, None
        if steps:
            self._path = run_dir / f"trace_step{steps[0]}_rank{rank}.json.gz"
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Step `step` is about to be taken."""
        if self._steps and step == self._steps[0]:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(activities=activities)
            self._running.start()

    def after(self, step: int) -> Path | None:
        """Step `step` has been taken: the trace, if it is the last one of it."""
        if self._running is None or step < self._steps[-1]:
            return None
        return self.close()

    def close(self) -> Path | None:
        """Write what there is; for a run that ends within the window."""
        if self._running is None or self._path is None:
            return None
        running, self._running = self._running, None
        running.stop()
        running.export_chrome_trace(str(self._path))
        return self._path
