"""At which precision features are computed, and at which they are kept; with the reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

Arithmetic = Literal["fp32", "bf16"]
PRECISIONS = ("auto", "fp32", "bf16")
#: What Linux calls instructions for products in bf16, of x86 and of ARM.
BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
_LEAST_NORMAL = float(np.finfo(np.float16).smallest_normal)
_MOST_SMALL = 0.1  # share of values that float16 would keep with fewer bits than it has


class Precision(NamedTuple):
    """How features are made and kept.

    arithmetic: of products. features: NumPy's name of the kept rows' type. why: a line for people.

    fp32 is kept as float32. What was computed in bf16 is kept as float16: its 11 significant bits hold the 8 of bf16,
    in half the room. Patch tokens, hundreds an image, are kept as float16 always.
    """

    arithmetic: Arithmetic
    features: Literal["float32", "float16"]
    why: str

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.features)


def choose_precision(asked: str, device: torch.device | str, flags: frozenset[str] | None = None) -> Precision:
    """The precision on a device; `flags` of its CPU, by default as this machine tells.

    Raises ValueError for another word, and for bf16 on a GPU that has none.
    """
    if asked not in PRECISIONS:
        raise ValueError(f"precision is {asked!r}; it must be one of {', '.join(PRECISIONS)}")
    if asked == "fp32":
        return Precision("fp32", "float32", "as asked")
    kind = torch.device(device).type
    if kind == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", "float16", f"{name} has bf16")
        if asked == "bf16":
            raise ValueError(f"precision is bf16, which {name} has no units for; use auto or fp32")
        return Precision("fp32", "float32", f"{name} has no bf16")
    found = (cpu_flags() if flags is None else flags) & set(BF16_FLAGS)
    if found:
        return Precision("bf16", "float16", f"this CPU has {', '.join(sorted(found))}")
    if asked == "bf16":
        return Precision("bf16", "float16", "as asked, though this CPU has no bf16 instructions: fp32 is faster here")
    return Precision("fp32", "float32", "this CPU has neither avx512_bf16 nor amx_bf16, and bf16 would be slower")


def cpu_flags() -> frozenset[str]:
    """What the first of this machine's CPUs can do, by Linux's names; empty where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(line[1].split()) if line else frozenset()


def kept(values: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """float32 `values` as they are kept.

    Raises ValueError where float16 could not hold them: what is beyond its range, or mostly so small that it has few
    bits left.
    """
    if dtype == np.float32:
        return values.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        small = values.astype(np.float16)
    advice = "give --precision fp32, whose features are kept as float32" if what == "features" else "leave out --tokens"
    if np.isinf(small).any() and not np.isinf(values).any():
        raise ValueError(
            f"{what} reach {np.abs(values[np.isfinite(values)]).max():g}, and float16 holds up to 65504; {advice}"
        )
    magnitude = np.abs(small)
    if values.size and ((magnitude < _LEAST_NORMAL) & (values != 0)).mean() > _MOST_SMALL:
        raise ValueError(
            f"{what} are mostly below {_LEAST_NORMAL:.1e}, where float16 has few bits, such as "
            f"{np.abs(values).mean():.1e}; {advice}"
        )
    return small
