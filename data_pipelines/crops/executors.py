"""Who makes the crops: the names that `data.executor` takes, and what each stands for on this machine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np

from data_pipelines.crops import native
from data_pipelines.crops.base import CropJob, Executor

#: `native`: the kernel in C. `wheels`: libraries that need no compiler. `device`: one of those cuts and resizes, the
#: GPU does the colours. `auto`: native where it is built, else wheels.
ExecutorName = Literal["auto", "native", "wheels", "device"]
CpuExecutorName = Literal["auto", "native", "wheels"]
_log = logging.getLogger(__name__)


def resolve_executor(name: ExecutorName, channels: int = 3, bits: int = 8) -> ExecutorName:
    """The executor that `auto` stands for here; the others as they are.

    Raises:
        ValueError: `native` where the kernel is not built; the message says how to build it. An executor that does not
            know images of these channels and bits.
    """
    if channels not in (1, 3) or bits != 8:
        if name not in ("auto", "wheels"):
            raise ValueError(
                f"executor {name!r} makes crops of 8-bit grey and RGB images; for {channels} channels of {bits} bits "
                "choose auto or wheels"
            )
        return "wheels"
    executor("auto" if name == "device" else name)  # says so where the kernel is missing
    return on_cpu(name) if name == "auto" else name


def on_cpu(name: ExecutorName) -> CpuExecutorName:
    """Who does the CPU's part of an executor's work: native or wheels."""
    if name in ("native", "wheels"):
        return name
    return "native" if native.BUILT else "wheels"


def executor(name: CpuExecutorName = "auto") -> Executor:
    """The executor of that name; all show the same pictures within the bounds that tests/ state.

    It takes images of any channels and 8 or 16 bits: those that are not 8-bit grey or RGB go to `any_channels`.

    Raises:
        ValueError: No such executor, or `native` where the kernel is not built.
    """
    from data_pipelines.crops import any_channels, wheels  # they import torch

    if name not in ("auto", "native", "wheels"):
        raise ValueError(f"executor {name!r} is not known; choose auto, native or wheels")
    if name == "native" and not native.BUILT:
        raise ValueError(f"executor native: the crop kernel is not built; {native.HOW_TO_BUILD}, or choose wheels")
    if name == "auto" and not native.BUILT:
        _tell_once()
    plain = native.render if name != "wheels" and native.BUILT else wheels.render

    def render(image: np.ndarray, jobs: Sequence[CropJob]) -> None:
        (plain if any_channels.is_plain(image) else any_channels.render)(image, jobs)

    return render


@cache
def _tell_once() -> None:
    _log.warning("the crop kernel is not built, so crops take about twice as long; %s", native.HOW_TO_BUILD)
