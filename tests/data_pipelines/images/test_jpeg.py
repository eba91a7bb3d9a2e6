"""JPEGs decode to Pillow's pixels, wholly or in part, upright, and damage is found either way."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from making import bands, deep_png, encode, picture
from PIL import Image, ImageOps

from data_pipelines.images import jpeg
from data_pipelines.images.decode import BadSampleError, decode, decode_picture, open_image, orientation_of
from data_pipelines.images.jpeg import decode_jpeg, has_regions, read_header
from data_pipelines.images.regions import Picture, Region, needed, whole
from data_pipelines.images.sample import Sample

needs_regions = pytest.mark.skipif(not has_regions(), reason="the extension _jpeg_region is not built")
KINDS = ("444", "422", "420", "440", "411", "grayscale", "progressive")


def sample(content: bytes) -> Sample:
    return Sample("the-key", Path("train-000000.tar"), content, None)


def jpeg_of(seed: int, height: int, width: int, kind: str = "420", orientation: int = 1) -> bytes:
    """A JPEG of noise over smooth colours, its samples of colour laid as `kind` says."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(picture(seed, height, width) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
    quality = int(rng.integers(40, 97))
    options: dict[str, object] = {"quality": quality}
    if orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    if kind == "grayscale":
        return encode(pixels[:, :, 0], "JPEG", **options)
    if kind == "progressive":
        return encode(pixels, "JPEG", progressive=True, **options)
    content = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", kind)
    if orientation != 1:
        exif = b"Exif\0\0" + options["exif"].tobytes()
        content = content[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + content[2:]
    return content


def pillows(content: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pixels_are_pillows(kind: str, padded: bool) -> None:
    for seed, (height, width) in enumerate([(1, 1), (1, 17), (16, 16), (33, 47), (120, 75)]):
        content = jpeg_of(seed, height, width, kind)
        found = decode_jpeg(content, 3, padded=padded)
        assert found is not None
        np.testing.assert_array_equal(found.pixels, pillows(content))
        assert found.pixels.strides[1] == (4 if padded else 3)
        assert not found.is_part


@pytest.mark.parametrize("kind", KINDS)
def test_grey_is_luma(kind: str) -> None:
    content = jpeg_of(3, 40, 50, kind)
    found = decode_jpeg(content, 1)
    luma = np.asarray(Image.open(io.BytesIO(content)).convert("L"), dtype=int)
    assert found.pixels.shape == (40, 50, 1)
    # Pillow's colours are cut off at 0 and 255 before they become grey
    assert np.abs(found.pixels[:, :, 0] - luma).max() <= (0 if kind == "grayscale" else 16)
    assert np.abs(found.pixels[:, :, 0] - luma).mean() < 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_up_is_up(orientation: int) -> None:
    content = jpeg_of(orientation, 24, 36, "444", orientation)
    np.testing.assert_array_equal(decode(sample(content)), pillows(content))
    assert read_header(content).size == pillows(content).shape[:2]


def test_odd_exif_is_read_as_pillow_reads_it() -> None:
    plain = jpeg_of(0, 24, 36)
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (
        b"Exif\0\0" + exif.tobytes(),
        b"Exif\0\0",
        b"Exif\0\0junk and no more",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x04\0\x01\0\0\0\x06\0\0\0\0\0\0\0",  # a long number instead of a short
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x2a\0\0\0\0\0\0\0",  # orientation 42
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",  # the other order of bytes
    ):
        content = plain[:2] + b"\xff\xe1" + (len(data) + 2).to_bytes(2, "big") + data + plain[2:]
        try:
            expected = Image.open(io.BytesIO(content)).getexif().get(0x0112, 1)
        except Exception:  # of any type: then the pixels stay as they are
            expected = 1
        turned = decode(sample(content)).shape[:2] == (36, 24)
        assert turned == (expected in (5, 6, 7, 8))


@needs_regions
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_a_part_is_the_same_pixels(kind: str, factor: int) -> None:
    rng = np.random.default_rng(factor)
    parts = 0
    for seed in range(40):
        height, width = (int(side) for side in rng.integers(1, 160, 2))
        content = jpeg_of(seed, height, width, kind, orientation=seed % 8 + 1)
        size = read_header(content).size
        (left, right), (top, bottom) = (sorted(rng.integers(0, side, 2).tolist()) for side in (size[1], size[0]))
        part = Region((left, top, right + 1, bottom + 1), factor)
        whole_picture = decode_jpeg(content, 3, lambda size: whole(size)._replace(factor=factor))
        found = decode_jpeg(content, 3, lambda _, part=part: part, padded=bool(seed % 2))
        if whole_picture is None or found is None:  # so small that a factor is another's equal
            assert factor > 1
            continue
        parts += found.pixels.shape != whole_picture.pixels.shape
        (a, b, c, d), (e, f, g, h) = (
            (math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3]))
            for box in (found.within(part.box), whole_picture.within(part.box))
        )
        np.testing.assert_array_equal(found.pixels[b:d, a:c], whole_picture.pixels[f:h, e:g])
    assert parts > 15 or kind == "progressive"


def test_only_what_is_asked_for_is_decoded() -> None:
    content = jpeg_of(1, 200, 300)
    asked: list[tuple[int, int]] = []

    def choose(size: tuple[int, int]) -> Region:
        asked.append(size)
        return Region((100, 50, 164, 80))

    found = decode_picture(sample(content), 3, choose)
    assert asked == [(200, 300)]
    assert found.pixels.shape == ((30, 64, 3) if has_regions() else (200, 300, 3))
    assert found.within((110, 60, 120, 70)) == ((10, 10, 20, 20) if has_regions() else (110, 60, 120, 70))


@pytest.mark.parametrize("kind", ["420", "grayscale", "progressive"])
def test_a_truncated_jpeg_is_found_whatever_part_is_asked_for(kind: str) -> None:
    content = jpeg_of(2, 120, 120, kind)
    for length in (*range(0, len(content) - 2, 97), len(content) - 2):
        for box in ((0, 0, 120, 8), (0, 0, 120, 120)):
            with pytest.raises(BadSampleError):
                decode_picture(sample(content[:length]), 3, lambda _, box=box: Region(box))


def test_a_jpeg_with_bytes_behind_it_is_good() -> None:
    content = jpeg_of(2, 50, 50)
    for box in ((0, 0, 20, 20), (0, 0, 50, 50)):
        found = decode_picture(sample(content + bytes(1000)), 3, lambda _, box=box: Region(box))
        np.testing.assert_array_equal(found.pixels[:20, :20], pillows(content)[:20, :20])


@needs_regions
@pytest.mark.parametrize("kind", ["420", "444", "grayscale"])
def test_damage_is_judged_alike_in_part_and_whole(kind: str) -> None:
    """Whatever is flipped: both are refused, or both show the same pixels."""
    rng = np.random.default_rng(5)
    content = np.frombuffer(jpeg_of(7, 90, 110, kind), dtype=np.uint8)
    left, top, right, bottom = box = (30, 40, 80, 60)
    refused = shown = 0
    for _ in range(400):
        damaged = content.copy()
        damaged[rng.integers(len(content), size=2)] ^= rng.integers(1, 256, 2, dtype=np.uint8)
        found: list[Picture | None] = []
        for choose in (whole, lambda size: Region(box) if size == (90, 110) else whole(size)):
            try:
                found.append(decode_picture(sample(damaged.tobytes()), 3, choose))
            except BadSampleError:
                found.append(None)
        full, part = found
        assert (full is None) == (part is None)
        if full is None or part is None:
            refused += 1
            continue
        shown += 1
        if full.pixels.shape[:2] == (90, 110):
            a, b, c, d = (int(edge) for edge in part.within(box))
            np.testing.assert_array_equal(part.pixels[b:d, a:c], full.pixels[top:bottom, left:right])
    assert min(refused, shown) > 20


@needs_regions
def test_the_region_decoder_refuses_what_does_not_fit() -> None:
    content = jpeg_of(0, 40, 60)
    here = read_header(content).scan

    def ask(
        scan: int = here,
        size: tuple[int, int] = (40, 60),
        factor: int = 1,
        corner: tuple[int, int] = (0, 0),
        shape: object = (8, 8, 3),
    ) -> None:
        jpeg.decode_region(content, scan, np.empty(shape, dtype=np.uint8), size, factor, corner)

    ask()
    for wrong in (
        {"scan": -1},
        {"scan": len(content) - 1},
        {"scan": 2},  # other markers follow
        {"size": (41, 60)},
        {"size": (0, 60)},
        {"size": (-40, 60)},
        {"size": (1 << 40, 60)},
        {"factor": 3},
        {"factor": 0},
        {"corner": (-1, 0)},
        {"corner": (53, 0)},
        {"corner": (0, 33)},
        {"factor": 2, "corner": (23, 0)},
        {"shape": (0, 8, 3)},
        {"shape": (8, 8, 2)},
        {"shape": (8, 8)},
    ):
        with pytest.raises(ValueError, match=r"."):
            ask(**wrong)
    with pytest.raises((ValueError, BufferError)):
        jpeg.decode_region(content, here, np.empty((8, 16, 3), dtype=np.uint8)[:, ::2], (40, 60), 1, (0, 0))
    with pytest.raises((ValueError, BufferError)):
        jpeg.decode_region(content, here, b"read only", (40, 60), 1, (0, 0))
    progressive = jpeg_of(0, 40, 60, "progressive")
    scan = read_header(progressive).scan
    with pytest.raises(ValueError, match="scan"):
        jpeg.decode_region(progressive, scan, np.empty((8, 8, 3), dtype=np.uint8), (40, 60), 1, (0, 0))


def test_unusual_files_are_left_to_pillow() -> None:
    file = io.BytesIO()
    Image.fromarray(picture(1)).convert("CMYK").save(file, "JPEG")
    assert read_header(file.getvalue()) is None
    assert decode(sample(file.getvalue())).shape == (20, 24, 3)
    for content in (b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", encode(picture(1)), b"\xff\xd8\xff\xe0\x00\x01" * 9):
        assert read_header(content) is None
    assert decode_jpeg(jpeg_of(0, 40, 60), 3, max_pixels=2399) is None
    assert decode_jpeg(jpeg_of(0, 40, 60), 3, max_pixels=2400) is not None


def test_what_crops_need() -> None:
    size, box = (400, 600), (10, 20, 110, 120)
    two = [(box, (33, 33)), ((200, 40, 300, 140), (33, 33))]
    assert needed(size, two) == Region((10, 20, 300, 140), 2)
    assert needed(size, [*two, (box, (34, 33))]).factor == 1  # fewer than 1.5 px for each of one side's
    assert needed(size, [(box, (8, 8))]).factor == 8
    assert needed(size, [(box, (8, 8))], scaling=False) == Region(box)
    assert needed(size, [(box, (101, 101))], partial=False) == whole(size)
    assert needed(size, [((0, 0, 590, 395), (500, 500))]) == whole(size)  # nearly all: no part is worth its trouble
    assert needed(size, [((10.5, 20.2, 100.1, 99.9), (224, 224))]) == Region((10, 20, 101, 100))


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2, "big") + content


EXIF = b"Exif\0\0II*\0\x08\0\0\0" + b"\x01\0" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + bytes(4)  # turned by 6
LITTER = {
    "exif": segment(0xE1, b"Exif\0\0" + bytes(65_000)),
    "exif that is one": segment(0xE1, EXIF + bytes(65_000)),
    "exif under another name": segment(0xE1, b"Exif\0\0MM\0+" + bytes(65_000)),
    "fill": b"\xff" * 65_000,
    "litter": bytes(65_000),
    "escaped litter": b"\xff\0" * 32_500,
    "comments": segment(0xFE, bytes(65_000)),
    "photoshop": segment(0xED, b"Photoshop 3.0\0" + bytes(65_000)),
    "profiles": segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65_000)),
}


@pytest.mark.parametrize("kind", LITTER)
@pytest.mark.parametrize("colours", ["RGB", "CMYK"])
def test_time_before_the_pixels_grows_with_the_file_and_little(kind: str, colours: str) -> None:
    """All that Python does is counted: the lines of ours and Pillow's that run, however long each of them takes."""
    plain = encode(np.asarray(Image.fromarray(picture(1)).convert(colours)), "JPEG") if colours == "RGB" else cmyk()
    found = {}
    for count in (4, 64):
        content = plain[:2] + count * LITTER[kind] + plain[2:]
        num_lines, num_bytes = work(lambda content=content: decode(sample(content)))
        found[count] = (num_lines, num_bytes / len(content))
    assert found[64][0] < 200 * 64 + found[4][0], found
    assert found[64][1] < 4 + 2 * found[4][1], found


def cmyk() -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(1)).convert("CMYK").save(file, "JPEG")
    return file.getvalue()


def work(action: Callable[[], object]) -> tuple[int, int]:
    """Lines that run in an action, and bytes that it holds at a time at most."""
    count = 0

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal count
        count += event == "line"
        return trace

    tracemalloc.start()
    sys.settrace(trace)
    try:
        with contextlib.suppress(BadSampleError):
            action()
    finally:
        sys.settrace(None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return count, peak


def test_of_several_exif_segments_the_first_turns_the_image() -> None:
    plain = encode(picture(1), "JPEG")
    others = 3 * segment(0xE1, b"Exif\0\0" + bytes(65_000))
    for content in (plain[:2] + segment(0xE1, EXIF) + others + plain[2:], plain[:2] + segment(0xE1, EXIF) + plain[2:]):
        assert read_header(content).orientation == 6
        assert decode(sample(content)).shape == (24, 20, 3)
        with open_image(content) as image:
            assert orientation_of(image) == 6


def test_exif_is_never_joined_so_that_its_time_is_not_that_of_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    monkeypatch.setattr(jpeg, "_orientation", lambda data, exif: lengths.append(len(exif)) or 1)
    plain = encode(picture(1), "JPEG")
    content = plain[:2] + 200 * LITTER["exif"] + plain[2:]
    assert read_header(content) is not None
    with open_image(content) as image:
        assert len(image.info["exif"]) == 65_006
    assert lengths == [65_000]


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
def test_no_tag_of_exif_takes_a_copy_of_all_of_it() -> None:
    """A megabyte of EXIF with a thousand tags, each of them half of it long."""
    tags = b"".join(struct.pack("<HHII", 1000 + tag, 7, 500_000, 100_000) for tag in range(1000))
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 1000) + tags + bytes(1_000_000)
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    png, deep = encode(picture(1)), deep_png(bands(1, 3))
    for content in (png[:33] + chunk + png[33:], deep[:33] + chunk + deep[33:], encode(picture(1), "WEBP", exif=exif)):
        _, peak = work(lambda content=content: decode(sample(content)))
        assert peak < 40 * len(content)


def test_a_jpeg_of_ever_so_many_segments_is_refused() -> None:
    plain = encode(picture(1), "JPEG")
    content = plain[:2] + 10_001 * segment(0xFE, b"") + plain[2:]
    with pytest.raises(BadSampleError, match="more than 10,000 segments before its pixels") as raised:
        decode(sample(content))
    assert raised.value.case == "too_large"
    assert decode(sample(plain[:2] + 5000 * segment(0xFE, b"") + plain[2:])).shape == (20, 24, 3)
