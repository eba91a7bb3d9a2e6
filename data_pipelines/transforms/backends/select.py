"""Who makes the crops: the names that `data.backend` takes, and what each stands for on this machine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np

from data_pipelines.transforms.backends import native
from data_pipelines.transforms.backends.base import Backend, CropJob
from data_pipelines.transforms.config import BackendName

CpuBackendName = Literal["auto", "native", "opencv"]
_log = logging.getLogger(__name__)


def resolve_backend(name: BackendName, channels: int = 3, bits: int = 8) -> BackendName:
    """The backend that `auto` stands for here; the others as they are.

    Raises:
        ValueError: `native` where the kernel is not built; the message says how to build it. An backend that does not
            know images of these channels and bits.
    """
    if name == "device" and (channels not in (1, 3) or bits != 8):
        raise ValueError(
            f"backend {name!r} makes crops of 8-bit grey and RGB images; for {channels} channels of {bits} bits "
            "choose auto, native or opencv"
        )
    backend("auto" if name == "device" else name)  # says so where the kernel is missing
    return on_cpu(name) if name == "auto" else name


def on_cpu(name: BackendName) -> CpuBackendName:
    """Who does the CPU's part of an backend's work: native or opencv."""
    if name in ("native", "opencv"):
        return name
    return "native" if native.BUILT else "opencv"


def backend(name: CpuBackendName = "auto") -> Backend:
    """The backend of that name; all show the same pictures within the bounds that tests/ state.

    It takes images of any channels and 8 or 16 bits; what is not 8-bit grey or RGB has a way of its own, see
    `any_channels`.

    Raises:
        ValueError: No such backend, or `native` where the kernel is not built.
    """
    from data_pipelines.transforms.backends import any_channels  # it takes a while to import

    if name not in ("auto", "native", "opencv"):
        raise ValueError(f"backend {name!r} is not known; choose auto, native or opencv")
    if name == "native" and not native.BUILT:
        raise ValueError(f"backend native: the crop kernel is not built; {native.HOW_TO_BUILD}, or choose opencv")
    if name == "auto" and not native.BUILT:
        _tell_once()
    plain: Backend = native.render
    other: Backend = native.render_channels
    if name == "opencv" or not native.BUILT:
        plain, other = _by_opencv, any_channels.render

    def render(image: np.ndarray, jobs: Sequence[CropJob]) -> None:
        (plain if any_channels.is_plain(image) else other)(image, jobs)

    return render


def _by_opencv(image: np.ndarray, jobs: Sequence[CropJob]) -> None:
    from data_pipelines.transforms.backends import opencv  # it imports torch: once there is something for it to do

    opencv.render(image, jobs)


@cache
def _tell_once() -> None:
    _log.warning("the crop kernel is not built, so crops take about twice as long; %s", native.HOW_TO_BUILD)
