"""A trace of some steps in the run folder, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data_pipelines.wording import counted
from pretrain.tracking.step_clock import StepClock

#: A trace beyond this is removed again: a viewer would not open it.
MOST_BYTES = 256 * 2**20


class StepProfile:
    """Records the steps `steps` (first and last, from 1, counted from the start of this process) on rank 0.

    What is recorded is written to `profile/` of the run folder and told. Elsewhere, and without `steps`, nothing is.
    """

    def __init__(
        self, folder: Path, device: torch.device, clock: StepClock, steps: tuple[int, int] | None, rank: int
    ) -> None:
        self._folder, self._device, self._clock = folder / "profile", device, clock
        self._steps = steps if rank == 0 else None
        self._begun = 0
        self._profiler: Any = None

    def begin(self) -> None:
        """A step begins."""
        self._begun += 1
        if self._steps is None or self._begun != self._steps[0]:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.__enter__()
        self._clock.tracing = True

    def end(self, step: int, last: bool = False) -> str | None:
        """Step `step` of the run has ended, perhaps as the last; a line where the trace did."""
        if self._profiler is None or self._steps is None or (self._begun < self._steps[1] and not last):
            return None
        return self.close(step)

    def close(self, step: int) -> str | None:
        """Write what is recorded, if anything is; a line that says where, or why not."""
        if self._steps is None:
            return None
        if self._profiler is None:
            if 0 < self._begun < self._steps[0]:
                return (
                    f"no trace was made: tracking.profile_steps is {list(self._steps)}, counted from this start, which "
                    f"made {counted(self._begun, 'step')}"
                )
            return None
        profiler, self._profiler = self._profiler, None
        self._clock.tracing = False
        profiler.__exit__(None, None, None)
        number = self._begun - self._steps[0]
        path = self._folder / f"steps-{step - number}-{step}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            if path.stat().st_size > MOST_BYTES:
                path.unlink()
                return f"the trace is larger than {MOST_BYTES >> 20} MB and is not kept; profile fewer steps"
        except OSError as error:
            return f"the trace can't be written: {error}"
        return f"a trace of steps {step - number} to {step} is in {path}; open it with ui.perfetto.dev"
