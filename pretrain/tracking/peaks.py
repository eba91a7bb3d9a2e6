"""The peak of a device in FLOP/s, by the name that torch gives it."""

from __future__ import annotations

import torch

#: TFLOP/s of dense products with bf16 factors, and with fp32 ones as they are computed by default here (TF32 where the
#: device has it), from the makers' data sheets, without structured sparsity; the first whose name is in the device's.
#: None: it has no such instructions. A card that draws less power than the data sheet's is below its peak.
PEAKS: tuple[tuple[str, float | None, float], ...] = (
    ("B200", 2250.0, 1125.0),
    ("GH200", 989.4, 494.7),
    ("H200 NVL", 835.5, 417.8),
    ("H200", 989.4, 494.7),
    ("H100 NVL", 835.5, 417.8),
    ("H100 PCIe", 756.0, 378.0),
    ("H100", 989.4, 494.7),
    ("A100", 311.9, 156.0),
    ("L40S", 362.0, 183.0),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 60.0),
    ("A40", 149.7, 74.8),
    ("A10", 125.0, 62.5),
    ("RTX A6000", 154.8, 77.4),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
    ("V100", None, 15.7),
    ("T4", None, 8.1),
    ("MI300X", 1307.4, 653.7),
)


def peak_flops(device: torch.device, precision: str, given_tflops: float | None = None) -> float | None:
    """FLOP/s of one device at the run's precision; `given_tflops`, where the user says it. None where it is not known,
    as of a CPU."""
    if given_tflops is not None:
        return given_tflops * 1e12
    return None if device.type != "cuda" else peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(name: str, precision: str) -> float | None:
    """FLOP/s of the device of that name."""
    words = f" {name.replace('-', ' ')} "
    if " MIG " in words:  # a slice of a device
        return None
    for known, in_bf16, in_fp32 in PEAKS:
        if f" {known} " in words:
            tflops = in_fp32 if precision == "fp32" else in_bf16
            return None if tflops is None else tflops * 1e12
    return None
