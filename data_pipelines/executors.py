"""Who makes the crops: the names that `data.executor` takes, and what each stands for on this machine."""

from __future__ import annotations

from typing import Literal

from data_pipelines import crops, native

#: `native`: the kernel in C. `wheels`: libraries that need no compiler. `device`: one of those cuts and resizes, the
#: GPU does the colours. `auto`: native where it is built, else wheels.
ExecutorName = Literal["auto", "native", "wheels", "device"]


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
    crops.executor("auto" if name == "device" else name)  # says so where the kernel is missing
    return on_cpu(name) if name == "auto" else name


def on_cpu(name: ExecutorName) -> crops.ExecutorName:
    """Who does the CPU's part of an executor's work: native or wheels."""
    if name in ("native", "wheels"):
        return name
    return "native" if native.BUILT else "wheels"
