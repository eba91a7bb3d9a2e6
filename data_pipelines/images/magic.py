"""What a file is by its first bytes, whatever its name says; only to tell people, nothing is decoded by it."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of file."""

    name: str  # with its article
    is_image: bool


_AT_START: tuple[tuple[bytes, str, bool], ...] = (
    (b"\xff\xd8", "a JPEG", True),
    (b"\x89PNG", "a PNG", True),
    (b"GIF8", "a GIF", True),
    (b"BM", "a BMP", True),
    (b"II*\0", "a TIFF", True),
    (b"MM\0*", "a TIFF", True),
    (b"II+\0", "a BigTIFF", True),
    (b"MM\0+", "a BigTIFF", True),
    (b"\0\0\x01\0", "an ICO", True),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000", True),
    (b"\xff\x4f\xff\x51", "a JPEG 2000", True),
    (b"\xff\x0a", "a JPEG XL", True),
    (b"\0\0\0\x0cJXL ", "a JPEG XL", True),
    (b"8BPS", "a Photoshop file", True),
    (b"v/1\x01", "an OpenEXR", True),
    (b"#?RADIANCE", "a Radiance HDR", True),
    (b"SIMPLE  =", "a FITS", True),
    (b"<svg", "an SVG", True),
    (b"\x93NUMPY", "a NumPy array", False),
    (b"\x89HDF", "an HDF5 file", False),
    (b"%PDF", "a PDF", False),
    (b"\x1f\x8b", "a gzip file", False),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", False),
    (b"BZh", "a bzip2 file", False),
    (b"\xfd7zXZ", "an xz file", False),
    (b"PK\x03\x04", "a zip file", False),
    (b"PAR1", "a Parquet file", False),
    (b"ID3", "an MP3", False),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", False),
)
#: Of an ISO container, whose first box is `ftyp`, by its brand.
_BRANDS = {b"heic": "a HEIC", b"heix": "a HEIC", b"mif1": "a HEIF", b"msf1": "a HEIF", b"avif": "an AVIF"}


def kind_of(content: bytes) -> Kind | None:
    """The kind of a file from its first 512 bytes; None if it is none of those known."""
    for start, name, is_image in _AT_START:
        if content.startswith(start):
            return Kind(name, is_image)
    if content.startswith(b"RIFF"):
        return Kind("a WebP", True) if content[8:12] == b"WEBP" else Kind("a RIFF file (sound or video)", False)
    if content[4:8] == b"ftyp":
        brand = content[8:12]
        return Kind(_BRANDS[brand], True) if brand in _BRANDS else Kind("a video", False)
    if content[128:132] == b"DICM":
        return Kind("a DICOM", True)
    if content[257:262] == b"ustar":
        return Kind("a tar", False)
    text = content[:512].lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"http/", b"<head", b"<?xml")):
        return Kind("a web page or XML", False)
    return None
