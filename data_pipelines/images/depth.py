"""Bits of a channel: how many a file stores, how many of them its levels use, and what a run keeps of them."""

from __future__ import annotations


def bits_used(levels: int) -> int:
    """Of levels joined by OR, the bits from the lowest to the highest that is ever set; 0 where all pixels are black.

    12 for cameras that write 12 bits into files of 16, whether right-aligned (0 .. 4,095) or left-aligned (multiples
    of 16).
    """
    return levels.bit_length() - max((levels & -levels).bit_length() - 1, 0)


def depth_warning(bits_stored: int, largest_level: int, run_bits: int) -> str | None:
    """What a run of `run_bits` a channel loses of images of `bits_stored`, whose largest level is `largest_level`.

    None where it loses nothing. A run of 8 bits keeps the high byte of 16, see `pixels.convert`.
    """
    if bits_stored <= run_bits:
        return None
    found = (largest_level >> (bits_stored - run_bits)) + 1
    used = largest_level.bit_length()
    told = f"the images have {bits_stored} bits a channel"
    if used < bits_stored:
        told += f" and use {used} of them (their largest level is {largest_level:,} of {(1 << bits_stored) - 1:,})"
    return (
        f"{told}, and a run of {run_bits} bits keeps the high byte: {found} grey level{'s' * (found > 1)} of "
        f"{largest_level + 1:,}. Set data.bits={bits_stored} to keep all of them"
    )
