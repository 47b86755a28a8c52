"""A profiler trace of a few steps, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dsmoe_vl.files import replacing


class StepProfiler:
    """Profiles this rank from the first to the last of `steps`; does nothing if `steps` is empty.

    Writes `trace_stepFIRST_rankRANK.json.gz`. Sparse layers label their phases `moe/...`. The time of an all-to-all is
    only in this trace and not logged, because timing every call would make the host wait for the accelerator.
    """

    def __init__(self, run_dir: Path, steps: tuple[int, ...], rank: int) -> None:
        self._steps, self._path = steps, None
        if steps:
            self._path = run_dir / f"trace_step{steps[0]}_rank{rank}.json.gz"
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Call before step `step`."""
        if self._steps and step == self._steps[0]:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(activities=activities)
            self._running.start()

    def after(self, step: int) -> Path | None:
        """Call after step `step`. Returns the trace file after the last profiled step. Raises OSError."""
        if self._running is None or step < self._steps[-1]:
            return None
        return self.close()

    def close(self) -> Path | None:
        """Write an unfinished trace, if the run ends within `steps`. Raises OSError."""
        if self._running is None or self._path is None:
            return None
        running, self._running = self._running, None
        running.stop()
        with replacing(self._path) as temporary:
            packed = temporary.with_suffix(".gz")  # the profiler packs a file with this name
            try:
                running.export_chrome_trace(str(packed))
                packed.replace(temporary)
            finally:
                packed.unlink(missing_ok=True)
        return self._path
