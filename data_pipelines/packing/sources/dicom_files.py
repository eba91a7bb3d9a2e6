"""DICOM files of a source: one image a frame, packed as PNG."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path

from data_pipelines.images.dicom import SUFFIXES, DicomFile, DicomHeader, check_window, is_dicom
from data_pipelines.images.issues import shown
from data_pipelines.images.pixels import UnusableImageError, check_file_size
from data_pipelines.packing.listing import ListingEntry, Skipped
from data_pipelines.wording import counted

_START = 132  # bytes that tell
_ONE, _FRAME = 1, 2  # `ListingEntry.file` of a file of one image, and of a frame, whose number is `offset`
_KEPT_OPEN = 1024  # files of several frames whose attributes are kept, some 10 kB each, as their frames are shuffled


class DicomFiles:
    """Finds DICOM files, and says at the end what they are packed as.

    Args:
        window: See `DicomFile.png`.
    """

    def __init__(self, window: tuple[float, float] | None = None) -> None:
        self._window = window
        self._found: Counter[tuple[str, int, str]] = Counter()  # files by modality, bits stored and what is kept
        self._num_inverted = self._num_frames = 0
        self._open = lru_cache(_KEPT_OPEN)(DicomFile)

    def entries(self, path: Path, name: str) -> list[ListingEntry] | Skipped | None:
        """One entry a frame of the file, `name` within its source; None if it is no DICOM.

        Looked into are files of DICOM's suffixes, and those without any or with a number for one, as scanners write
        them.
        """
        suffix = path.suffix[1:].lower()
        if suffix not in SUFFIXES and suffix and not suffix.isdigit():
            return None
        try:
            with path.open("rb") as file:
                if not is_dicom(file.read(_START)):
                    return Skipped(name, "not a DICOM, as its suffix says") if suffix in SUFFIXES else None
            size = path.stat().st_size
            check_file_size(size)
            header = DicomFile(path).header
            if self._window is not None:
                check_window(header)
        except UnusableImageError as error:
            return Skipped(name, shown(str(error)))
        except OSError as error:
            return Skipped(name, error.strerror or "cannot be read")
        self._found[header.modality, header.bits_stored, self._kept(header)] += 1
        self._num_inverted += header.inverted
        if header.frames == 1:
            return [ListingEntry(name, size, _ONE)]
        self._num_frames += header.frames
        return [
            ListingEntry(f"{name}#{frame:04d}", max(size // header.frames, 1), _FRAME, frame)
            for frame in range(header.frames)
        ]

    def content(self, root: Path, entry: ListingEntry) -> bytes | None:
        """The PNG of an entry; None if it is of no DICOM. Raises as `DicomFile.png` does."""
        if entry.file not in (_ONE, _FRAME):
            return None
        path = root / path_of(entry)
        return (self._open(path) if entry.file == _FRAME else DicomFile(path)).png(entry.offset, self._window)

    def notes(self) -> list[str]:
        """What was found, and what becomes of its depth."""
        notes = [
            f"{counted(count, 'DICOM file')} ({shown(modality) or 'no modality'}, {bits} bits stored): {kept}"
            for (modality, bits, kept), count in sorted(self._found.items())
        ]
        if self._num_frames:
            notes.append(
                f"{self._num_frames:,} frames of DICOM files of several are images of their own; a share that is held "
                "back takes all frames of a file or none"
            )
        if self._num_inverted:
            notes.append(f"{counted(self._num_inverted, 'DICOM file')} in which white is zero (MONOCHROME1): inverted")
        return notes

    def _kept(self, header: DicomHeader) -> str:
        """What of its levels is packed."""
        if header.colour:
            return "colours as they are" + (", which no window applies to" if self._window is not None else "")
        if self._window is not None:
            return f"8 bits by the window {self._window[0]:g}, {self._window[1]:g}"
        if header.hounsfield:
            return "Hounsfield units -1024 .. 3071 spread over 16 bits, each a level of its own"
        bits = header.bits_stored
        return f"{16 if bits > 8 else 8} bits, each of the {1 << bits:,} levels one of its own"


def path_of(entry: ListingEntry) -> str:
    """The file that an entry lies in, within its source."""
    return entry.path.rpartition("#")[0] if entry.file == _FRAME else entry.path


def group_of(entries: list[ListingEntry]) -> str | None:
    """What keeps the frames of one file together; None where it is one image."""
    return path_of(entries[0]) if len(entries) > 1 else None
