"""DICOM files of a source: one image a frame, packed as PNG."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from data_pipelines.images.dicom import SUFFIXES, dicom_to_png, is_dicom, look_at_dicom
from data_pipelines.images.issues import shown
from data_pipelines.images.pixels import UnusableImageError, check_file_size
from data_pipelines.packing.listing import ListingEntry, Skipped

_START = 132  # bytes that tell
_ONE, _FRAME = 1, 2  # `ListingEntry.file` of a file of one image, and of a frame, whose number is `offset`


class DicomFiles:
    """Finds DICOM files, and says at the end what they are packed as.

    Args:
        window: See `dicom_to_png`.
    """

    def __init__(self, window: tuple[float, float] | None = None) -> None:
        self._window = window
        self._found: Counter[tuple[str, int]] = Counter()  # files by modality and bits stored
        self._num_inverted = self._num_frames = 0

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
            header = look_at_dicom(path.read_bytes())
        except UnusableImageError as error:
            return Skipped(name, shown(str(error)))
        except OSError as error:
            return Skipped(name, error.strerror or "cannot be read")
        self._found[header.modality, header.bits_stored] += 1
        self._num_inverted += header.inverted
        if header.frames == 1:
            return [ListingEntry(name, size, _ONE)]
        self._num_frames += header.frames
        return [
            ListingEntry(f"{name}#{frame:04d}", max(size // header.frames, 1), _FRAME, frame)
            for frame in range(header.frames)
        ]

    def content(self, root: Path, entry: ListingEntry) -> bytes | None:
        """The PNG of an entry; None if it is of no DICOM. Raises UnusableImageError as `dicom_to_png` does."""
        if entry.file not in (_ONE, _FRAME):
            return None
        name = entry.path.rpartition("#")[0] if entry.file == _FRAME else entry.path
        return dicom_to_png((root / name).read_bytes(), entry.offset, self._window)

    def notes(self) -> list[str]:
        """What was found, and what becomes of its depth."""
        notes = []
        for (modality, bits), count in sorted(self._found.items()):
            if self._window is not None:
                kept = f"8 bits by the window {self._window[0]:g}, {self._window[1]:g}"
            elif modality == "CT":
                kept = "Hounsfield units -1024 .. 3071 spread over 16 bits, each a level of its own"
            else:
                kept = f"{16 if bits > 8 else 8} bits, each of the {1 << bits:,} levels one of its own"
            notes.append(f"{count:,} DICOM files ({shown(modality) or 'no modality'}, {bits} bits stored): {kept}")
        if self._num_frames:
            notes.append(f"{self._num_frames:,} frames of DICOM files of several are images of their own")
        if self._num_inverted:
            notes.append(f"{self._num_inverted:,} DICOM files in which white is zero (MONOCHROME1) are inverted")
        return notes
