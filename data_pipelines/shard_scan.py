"""What the headers of a shard tell: its samples, and what of it is no sample or doubtful."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.cases import shown
from data_pipelines.findings import Findings
from data_pipelines.tar import Member, Special, TarDamageError, Trailing, walk

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
NO_LABEL = -1
_MAX_LABEL_BYTES = 32
_MAX_USUAL_NAME = 255  # longer ones are told
# WebDataset's rules: a key ends at the first dot of the base name; names in double underscores are its own
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(slots=True)
class Entry:
    """What lies under one key; offsets and sizes are bytes in the tar."""

    name: str  # of its first member
    image: tuple[int, int] | None = None
    suffix: str = ""  # of the image, as "jpg" or "depth.png"
    label: int = NO_LABEL
    has_label: bool = False  # there is a .cls, whatever it holds
    json: tuple[int, int] = (0, 0)


@dataclass
class ShardScan:
    """The samples by key, in the order of the tar, and what was found; `broken`: the tar does not reach its end."""

    samples: dict[str, Entry]
    findings: Findings
    broken: bool


def scan_shard(shard: Path) -> ShardScan:
    """Read a shard's headers and labels.

    A sample is a key with an image. Of several images or labels under one key the first counts (a plain suffix before
    a compound one such as `depth.png`). Of an archive cut short, everything before the cut.

    Raises:
        OSError: The file system fails.
    """
    entries: dict[str, Entry] = {}
    findings, broken = Findings(), False

    def found(case: str, name: str | None = None, reason: str | None = None) -> None:
        findings.add(case, shard.name, name, reason)

    with shard.open("rb") as file:
        try:
            for item in walk(file):
                if isinstance(item, Trailing):
                    found("more_after_end" if item.is_tar else "junk_after_end", None, f"at byte {item.offset}")
                    continue
                match = _NAME.match(item.name)
                if match is None or _META.search(item.name):
                    if isinstance(item, Member) and item.name.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
                        found("no_key", item.name)
                    continue
                if isinstance(item, Special):
                    found("special_member", item.name, item.kind)
                    continue
                if _is_odd(item.name):
                    found("odd_name", item.name)
                key, suffix = match[1], match[2].lower()
                entry = entries.setdefault(key, Entry(item.name))
                case = _enter(entry, suffix, item, file.fileno())
                if case is not None:
                    found(case, item.name)
        except TarDamageError as error:
            broken = True
            found(error.case, None, f"{error}; {len(entries)} keys before that")
    samples = {key: entry for key, entry in entries.items() if entry.image is not None}
    for key, entry in entries.items():
        if entry.image is None:
            found("no_image", key, f"its first member is {shown(entry.name)}")
    if not samples and not findings.counts["not_a_tar"]:
        found("empty_shard")
    return ShardScan(samples, findings, broken)


def _enter(entry: Entry, suffix: str, member: Member, descriptor: int) -> str | None:
    """Take a member into its sample; the case if something is wrong with it."""
    if suffix.rpartition(".")[2] in IMAGE_SUFFIXES:
        plain, held_plain = suffix in IMAGE_SUFFIXES, entry.suffix in IMAGE_SUFFIXES
        if entry.image is not None and plain == held_plain:
            return "repeated_member"
        if entry.image is None or plain:
            entry.image, entry.suffix = (member.offset, member.size), suffix
    elif suffix == "cls":
        if entry.has_label:
            return "repeated_member"
        entry.has_label = True
        label = _label(os.pread(descriptor, min(member.size, _MAX_LABEL_BYTES + 1), member.offset))
        if label is None:
            return "bad_label"
        entry.label = label
    elif suffix == "json":
        if entry.json[1]:
            return "repeated_member"
        entry.json = (member.offset, member.size)
    return None


def _label(text: bytes) -> int | None:
    stripped = text.strip()
    return int(stripped) if len(text) <= _MAX_LABEL_BYTES and stripped.isdigit() and len(stripped) < 19 else None


def _is_odd(name: str) -> bool:
    return not name.isprintable() or name[0] == "/" or ".." in name.split("/") or len(name) > _MAX_USUAL_NAME
