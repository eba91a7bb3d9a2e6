"""What the built-in images are called: of what is known of each, without a draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_COUNTS = (*NUMERALS, "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen")
_PLACES = ("a temple", "flowers")  # of scikit-learn's two photographs


def sheet_captions(numeral: int, count: int, photo: int) -> tuple[str, ...]:
    """Of a sheet of one numeral, `count` times, over photograph number `photo`."""
    name, place = NUMERALS[numeral], _PLACES[photo]
    return (
        f"{_COUNTS[count]} {_plural(name)} on {place}",
        f"the numeral {name}, {_COUNTS[count]} times, over a picture of {place}",
        f"a sheet of handwritten {_plural(name)}",
    )


def scene_captions(numerals: Sequence[int], photo: int) -> tuple[str, ...]:
    """Of a scene of two numerals, one of them more often, over photograph number `photo`."""
    (often, most), (seldom, few) = Counter(numerals).most_common(2)
    parts = (_amount(often, most), _amount(seldom, few))
    return (
        f"{parts[0]} and {parts[1]} on {_PLACES[photo]}",
        f"mostly {_plural(NUMERALS[often])} and also {parts[1]}",
    )


def _amount(numeral: int, count: int) -> str:
    name = NUMERALS[numeral]
    return f"{'an' if name == 'eight' else 'a'} {name}" if count == 1 else f"{_COUNTS[count]} {_plural(name)}"


def _plural(name: str) -> str:
    return f"{name}es" if name == "six" else f"{name}s"
