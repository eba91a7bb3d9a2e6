"""Everything that can be wrong with a data set, and what is done about each: `CASES` is the one list of it.

An *error* loses data, or makes them other than their owner thinks. A *note* is worth knowing and loses nothing.
Names of members come from strangers: they are keys, never paths, and are `shown` with every letter visible.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Severity(StrEnum):
    """Whether data are lost."""

    ERROR = "error"
    NOTE = "note"


class Case(NamedTuple):
    """One thing that can be found."""

    severity: Severity
    found: str  # what it is
    done: str  # what a run does about it


_REPLACED = "replaced by the next good sample of its shard, counted, named"
_ERROR, _NOTE = Severity.ERROR, Severity.NOTE

#: By the name that `verify.json`, `bad_samples/*.jsonl` and the errors use.
CASES: dict[str, Case] = {
    # images
    "empty_image": Case(_ERROR, "an image of no bytes", _REPLACED),
    "not_an_image": Case(_ERROR, "no image, such as text or a web page under .jpg", _REPLACED),
    "other_format": Case(_ERROR, "an image of a format that is not read, such as GIF, BMP or float arrays", _REPLACED),
    "damaged_image": Case(_ERROR, "truncated, or damaged so that its decoder stops", _REPLACED),
    "too_large": Case(_ERROR, "more pixels, JPEG scans or bytes than the limit; nothing is unpacked", _REPLACED),
    "wrong_suffix": Case(_NOTE, "an image whose suffix names another format", "used as what it is"),
    "animated": Case(
        _NOTE, "several frames, pages or pictures in one file", "the first that is no smaller copy is used"
    ),
    "transparent": Case(_NOTE, "an alpha channel or a transparent colour", "put on black"),
    "odd_opacity": Case(
        _NOTE,
        "an opacity that is neither nothing nor full in most places, as a band such as infrared would be",
        "the other channels are put on black by it; a run whose data.channels counts it in takes it as it is",
    ),
    "palette": Case(_NOTE, "colours by a palette", "the palette is applied"),
    "cmyk": Case(_NOTE, "CMYK instead of RGB", "converted without a colour profile"),
    "deep": Case(_NOTE, "more than 8 bits a channel", "the high byte is used by a run of 8 bits"),
    "turned": Case(_NOTE, "turned or mirrored by its EXIF orientation", "applied, so that up is up"),
    "tiny": Case(_NOTE, "a side of less than 8 px", "used, enlarged"),
    "other_channels": Case(_ERROR, "channels that cannot be made those of the run", _REPLACED),
    "other_frames": Case(
        _ERROR, "one image where a run reads stacks, or a stack whose frames are not of one size", _REPLACED
    ),
    "mixed_channels": Case(_ERROR, "images of other numbers of channels than most", _REPLACED),
    # samples: what lies under one key
    "repeated_member": Case(
        _ERROR, "several images or labels under one key, which ends at the first dot of a name", "the first is used"
    ),
    "no_image": Case(_ERROR, "a key with a label or metadata and no image", "no sample"),
    "bad_label": Case(_ERROR, "a .cls that is no integer of 0 or more", "the sample has no label"),
    "label_out_of_range": Case(_ERROR, "a label beyond the classes of dataset.json", "a probe refuses the data set"),
    "no_label": Case(_NOTE, "an image without .cls in a data set that has labels", "used; left out by probes"),
    "bad_json": Case(_NOTE, "a .json that is no JSON in UTF-8", "used; no run reads it"),
    "bad_map": Case(
        _ERROR,
        "a mask or depths beside an image that cannot be read, or are not of its size",
        "the image is used; a probe that needs them refuses the data set",
    ),
    "no_map": Case(
        _NOTE,
        "an image without a mask or depths in a data set that has such",
        "used; left out by dense probes",
    ),
    "odd_name": Case(_NOTE, "a name with .., an absolute path, control letters or not UTF-8", "used as a key, no path"),
    "no_key": Case(_NOTE, "an image file without a name before its first dot, or other litter", "passed over"),
    "special_member": Case(_NOTE, "a link, device or sparse file of a sample's name", "passed over"),
    # shards
    "cut_short": Case(_ERROR, "a tar that ends before its end marker", "everything before the cut is used"),
    "corrupt_header": Case(_ERROR, "a tar with a header that is none", "everything before it is used"),
    "not_a_tar": Case(_ERROR, "no tar at all, or a compressed one", "no sample; other shards are used"),
    "empty_shard": Case(_ERROR, "a tar without a sample", "other shards are used"),
    "unreadable": Case(_ERROR, "a shard that the file system does not give", "a run retries, then ends and names it"),
    "more_after_end": Case(_ERROR, "another tar after the end marker", "not used, as every reader of tars does"),
    "junk_after_end": Case(_NOTE, "bytes that are no tar after the end marker", "passed over"),
    "same_shard": Case(_ERROR, "two shards of the same bytes", "both are used; a probe refuses one in train and val"),
    "repeated_key": Case(_NOTE, "a key that is in several shards", "both are used; a sample is known by its number"),
    "foreign_index": Case(_ERROR, "an index that fits another shard", "used as it is: remove it"),
    "stale_index": Case(_NOTE, "an index of an earlier state of the shard", "built again"),
    # dataset.json
    "missing_shard": Case(_ERROR, "a shard that dataset.json lists and that is not there", "the others are used"),
    "unlisted_shard": Case(_ERROR, "a shard that dataset.json does not list", "used"),
    "other_bytes": Case(_ERROR, "a shard whose checksum is not that of dataset.json", "used as it is"),
    "other_counts": Case(_ERROR, "samples or class counts that differ from dataset.json", "used as they are"),
}

_MAX_SHOWN = 200


def table() -> str:
    """`CASES` as a table in Markdown, the errors first."""
    lines = ["| name | what | what is done |", "| --- | --- | --- |"]
    for severity in Severity:
        lines.append(f"| **{severity}s** | | |")
        lines += [
            f"| `{name}` | {case.found} | {case.done} |" for name, case in CASES.items() if case.severity == severity
        ]
    return "\n".join(lines)


def shown(name: str) -> str:
    """A name or text from a stranger for people to read: one line, no control letters, at most 200 letters.

    What cannot be printed (terminal escapes, line breaks, letters that change the direction of text, bytes that are
    no UTF-8) appears escaped as in Python, and so does a backslash.
    """
    letters = "".join(
        letter if letter.isprintable() and letter != "\\" else _escaped(letter) for letter in name[:_MAX_SHOWN]
    )
    return letters if len(name) <= _MAX_SHOWN else f"{letters}... ({len(name):,} letters)"


def visible(text: str) -> str:
    """Text of ours in which there may be names from strangers, for a terminal: control letters and what else cannot be
    printed escaped as `shown` does, line breaks and backslashes as they are."""
    return "".join(letter if letter.isprintable() or letter == "\n" else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was no UTF-8, as `surrogateescape` keeps it
        return f"\\x{code - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()
