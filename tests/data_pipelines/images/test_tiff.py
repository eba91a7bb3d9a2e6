"""TIFF against tifffile and Pillow as its writers, and against damage of every kind."""

from __future__ import annotations

import contextlib
import io
import itertools
import struct
import tracemalloc
from typing import Any

import imagecodecs
import numpy as np
import pytest
from making import bands, picture, tiff
from PIL import Image, ImageOps, TiffImagePlugin
from tifffile import TiffWriter

from data_pipelines.images import tiff as tiff_module
from data_pipelines.images.decode import DAMAGE
from data_pipelines.images.pixels import UnusableImageError
from data_pipelines.images.tiff import look_at_tiff

DEEP = bands(1, 13, 37, 53)


def read_tiff(content: bytes, channels: int | None) -> np.ndarray:
    return tiff_module.read_tiff(content, channels).pixels


def flat(pixels: np.ndarray, **options: Any) -> bytes:
    """A TIFF of (h, w, c) whose channels say nothing of colours."""
    planes = options.get("planarconfig") == "separate"
    photometric = "minisblack" if pixels.shape[2] not in (3, 4) else "rgb"
    if pixels.shape[2] == 4:
        options.setdefault("extrasamples", ["unspecified"])
    if pixels.shape[2] == 1:
        pixels, planes = pixels[:, :, 0], False
        options.pop("planarconfig", None)
    return tiff(
        np.ascontiguousarray(np.moveaxis(pixels, 2, 0)) if planes else pixels, photometric=photometric, **options
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_whatever_way_it_is_stored(dtype: type, channels: int) -> None:
    pixels = DEEP[:, :, :channels]
    pixels = (pixels >> 8).astype(np.uint8) if dtype == np.uint8 else pixels
    for layout, tile, order, big, packed in itertools.product(
        ("contig", "separate"),
        (None, (16, 32)),
        "<>",
        (False, True),
        ((None, False), ("zlib", False), ("zlib", True), ("zstd", True)),
    ):
        compression, predictor = packed
        pieces = {"rowsperstrip": 10} if tile is None else {"tile": tile}
        content = flat(
            pixels, planarconfig=layout, byteorder=order, bigtiff=big, compression=compression,
            predictor=predictor or None, **pieces,
        )  # fmt: skip
        found = read_tiff(content, channels)
        assert found.dtype == dtype
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, pixels)
        header = look_at_tiff(content)
        assert (header.width, header.height, header.channels) == (53, 37, channels)
        assert header.bits == 8 * found.dtype.itemsize


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_deflate", "tiff_adobe_deflate", None])
def test_what_libtiff_packs(compression: str | None) -> None:
    for pixels in (picture(2), picture(2)[:, :, 0], DEEP[:, :, 0]):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "TIFF", compression=compression)
        found = read_tiff(file.getvalue(), None)
        np.testing.assert_array_equal(found, pixels.reshape(*pixels.shape[:2], -1))
        content = file.getvalue()
        for length in range(0, len(content), 97):
            with pytest.raises(DAMAGE):
                read_tiff(content[:length], None)


def test_pages_of_one_channel_are_the_channels_of_an_image() -> None:
    stack = np.ascontiguousarray(np.moveaxis(DEEP, 2, 0))
    content = tiff(stack, photometric="minisblack")  # tifffile makes 13 pages of it
    np.testing.assert_array_equal(read_tiff(content, 13), DEEP)
    assert look_at_tiff(content).channels == 13
    with pytest.raises(ValueError, match="13 pages of 53x37 px and one channel each, and data"):
        read_tiff(content, 3)


def test_other_pages_are_passed_over() -> None:
    def written(*pages: tuple[np.ndarray, dict[str, Any]]) -> bytes:
        file = io.BytesIO()
        with TiffWriter(file) as writer:
            for page, options in pages:
                writer.write(page, **options)
        return file.getvalue()

    grey, colour = DEEP[:, :, 0], picture(3)
    small_copy = (grey[::2, ::2], {"subfiletype": 1})
    np.testing.assert_array_equal(read_tiff(written((grey, {}), small_copy), 1)[:, :, 0], grey)
    np.testing.assert_array_equal(read_tiff(written((grey, {}), (grey[:20], {})), 1)[:, :, 0], grey)
    np.testing.assert_array_equal(read_tiff(written((colour, {}), (colour[::-1], {})), 3), colour)


@pytest.mark.parametrize("channels", [2, 5, 7])
@pytest.mark.parametrize("options", [{}, {"metadata": None}, {"bigtiff": True}, {"byteorder": ">"}])
def test_channels_last_as_tifffile_writes_them_page_by_page(channels: int, options: dict[str, Any]) -> None:
    pixels = DEEP[:, :, :channels]
    content = tiff(pixels, **options)
    np.testing.assert_array_equal(read_tiff(content, channels), pixels)
    if "metadata" in options:  # nothing tells rows from channels but the number that is asked for
        assert look_at_tiff(content).channels == 37
        return
    header = look_at_tiff(content)
    assert (header.width, header.height, header.channels, header.num_images) == (53, 37, channels, 1)
    np.testing.assert_array_equal(read_tiff(content, None), pixels)
    with pytest.raises(ValueError, match=f"37 pages of {channels}x53 px .* data.channels is 3"):
        read_tiff(content, 3)


def test_axes_that_tifffile_names_are_believed() -> None:
    stack = np.ascontiguousarray(np.moveaxis(DEEP[:11, :7], 2, 0))  # 13 channels of 11 x 7 px: the last axis is shorter
    assert look_at_tiff(tiff(stack, photometric="minisblack")).channels == 7
    named = tiff(stack, photometric="minisblack", metadata={"axes": "CYX"})
    assert look_at_tiff(named).channels == 13
    np.testing.assert_array_equal(read_tiff(named, None), DEEP[:11, :7])
    last = np.ascontiguousarray(DEEP[:3, :5])
    named = tiff(last, photometric="minisblack", metadata={"axes": "YXC"})
    np.testing.assert_array_equal(read_tiff(named, None), last)


def test_axes_of_one_length_are_not_guessed() -> None:
    content = tiff(DEEP[:5, :9, :5], photometric="minisblack")
    assert look_at_tiff(content).channels is None
    with pytest.raises(ValueError, match=r"5x9x5 may be \(h, w, c\) as well as \(c, h, w\) with c = 5"):
        read_tiff(content, 5)


@pytest.mark.parametrize("shape", [(2, 37, 53, 5), (2, 5, 37, 53), (1, 2, 1, 5, 37, 53)])
def test_of_several_many_channelled_images_the_first_is_used_and_told(shape: tuple[int, ...]) -> None:
    many = bands(4, 10, 37, 53).reshape(-1)[: np.prod(shape)].reshape(shape)
    content = tiff(many, photometric="minisblack")
    found = tiff_module.read_tiff(content, 5)
    first = many.reshape(2, *shape[-3:])[0]
    np.testing.assert_array_equal(found.pixels, first if shape[-1] == 5 else np.moveaxis(first, 0, 2))
    assert found.notes == ("animated",)
    assert look_at_tiff(content).num_images == 2


def pages(*written: tuple[np.ndarray, dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    with TiffWriter(file) as writer:
        for page, options in written:
            writer.write(page, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize("pixels", [DEEP[:, :, 0], picture(3)], ids=["grayscale", "colour"])
def test_a_smaller_copy_or_mask_that_comes_first_is_passed_over(kind: int, pixels: np.ndarray) -> None:
    small = pixels[::4, ::4] if kind != 4 else pixels[::4, ::4].reshape(10, -1) > 100  # a mask is of one bit
    content = pages((small, {"subfiletype": kind}), (pixels, {}), (small, {"subfiletype": kind}))
    found = tiff_module.read_tiff(content, None)
    np.testing.assert_array_equal(found.pixels.squeeze(), pixels)
    assert found.notes == ()
    header = look_at_tiff(content)
    assert (header.height, header.width, header.num_images) == (*pixels.shape[:2], 1)


def test_a_file_of_nothing_but_smaller_copies_has_its_first() -> None:
    small = picture(3)[::2, ::2]
    np.testing.assert_array_equal(read_tiff(pages((small, {"subfiletype": 1})), 3), small)


def test_several_pages_are_told() -> None:
    colour, grey = picture(3), DEEP[:, :, 0]
    for content in (pages((colour, {}), (colour, {}), (colour, {})), pages((grey, {}), (grey[:20], {}))):
        assert tiff_module.read_tiff(content, None).notes == ("animated",)
        assert look_at_tiff(content).num_images > 1


def test_opacity_is_applied_unless_it_is_counted() -> None:
    pixels = DEEP[:, :, :4]
    content = tiff(pixels, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_tiff(content, 4), pixels)
    expected = np.rint(pixels[:, :, :3].astype(float) * pixels[:, :, 3:] / 65535)
    found = read_tiff(content, 3)
    assert np.abs(found - expected).max() <= 1
    assert look_at_tiff(content).channels == 3
    multiplied = tiff(pixels, photometric="rgb", extrasamples=["assocalpha"])
    np.testing.assert_array_equal(read_tiff(multiplied, 3), pixels[:, :, :3])


def test_white_is_zero_and_palettes() -> None:
    np.testing.assert_array_equal(read_tiff(tiff(DEEP[:, :, 0], photometric="miniswhite"), 1)[:, :, 0], ~DEEP[:, :, 0])
    image = Image.fromarray(picture(4)).quantize(40)
    file = io.BytesIO()
    image.save(file, "TIFF")
    np.testing.assert_array_equal(read_tiff(file.getvalue(), 3), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_pillows(orientation: int) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[274] = orientation
    file = io.BytesIO()
    Image.fromarray(picture(5)).save(file, "TIFF", tiffinfo=tags)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))
    np.testing.assert_array_equal(read_tiff(file.getvalue(), 3), np.asarray(expected))


def test_what_is_not_read_is_named() -> None:
    for content, reason in (
        (tiff(DEEP.astype(np.float32)), "32-bit floating-point"),
        (tiff(DEEP[:, :, 0].astype(np.int16)), "16-bit signed"),
        (tiff(DEEP[:, :, 0].astype(np.uint32)), "32-bit unsigned"),
        (tiff(DEEP[:, :, :4] // 256, photometric="separated"), "CMYK"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_tiff(content, None)
    file = io.BytesIO()
    Image.fromarray(picture(1)).save(file, "TIFF", compression="jpeg")
    with pytest.raises(ValueError, match=r"JPEG \(7\); store it by Deflate"):
        read_tiff(file.getvalue(), 3)
    file = io.BytesIO()
    Image.fromarray(picture(1)).convert("1").save(file, "TIFF")
    with pytest.raises(ValueError, match="1-bit unsigned"):
        read_tiff(file.getvalue(), 1)


def patched(content: bytes, tag: int, value: int) -> bytes:
    """A classic little-endian TIFF with another (first) value of a tag whose values lie in its entry."""
    (place,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, place)
    for entry in range(place + 2, place + 2 + 12 * count, 12):
        if struct.unpack_from("<H", content, entry)[0] == tag:
            kind = struct.unpack_from("<H", content, entry + 2)[0]
            replaced = bytearray(content)
            struct.pack_into("<I" if kind == 4 else "<H", replaced, entry + 8, value)
            return bytes(replaced)
    raise AssertionError(f"no tag {tag}")


def test_sizes_that_cannot_be_meant_take_no_memory() -> None:
    content = tiff(DEEP[:, :, 0], compression="zlib", rowsperstrip=64)
    for tag, value, reason in (
        (256, 4_000_000, "pixels are more than"),
        (257, 4_000_000, "pixels are more than"),
        (257, 0, "has nothing in it"),
        (257, 1_000_000, "pieces that says where"),
        (277, 60_000, "damaged TIFF"),
        (256, 1000, "damaged TIFF"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_tiff(patched(content, tag, value), 1)
    tiles = tiff(DEEP[:, :, 0], tile=(16, 16))
    with pytest.raises(ValueError, match="pixels are more than"):
        read_tiff(patched(patched(tiles, 322, 65_520), 323, 65_520), 1)


@pytest.mark.parametrize("compression", ["zlib", "lzw", "packbits", "zstd"])
def test_a_bomb_takes_no_memory(compression: str) -> None:
    pixels = np.full((16, 16), 7, np.uint8)
    content = tiff(pixels, compression=compression)
    np.testing.assert_array_equal(read_tiff(content, 1)[:, :, 0], pixels)
    if compression == "packbits":
        bomb = b"\x81\0" * 150_000  # each 128 times 0
    else:
        bomb = getattr(imagecodecs, f"{compression}_encode")(bytes(20_000_000))
    content = patched(patched(content + bomb, 273, len(content)), 279, len(bomb))
    tracemalloc.start()
    with contextlib.suppress(*DAMAGE):  # or the first 256 of its bytes
        assert not read_tiff(content, 1).any()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * len(content) + 300_000


def entry(tag: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack("<HHII", tag, kind, count, value)


def test_tags_take_no_more_than_the_file() -> None:
    plain = tiff(DEEP[:, :, 0])
    (place,) = struct.unpack_from("<I", plain, 4)
    (count,) = struct.unpack_from("<H", plain, place)
    own = plain[place + 2 : place + 2 + 12 * count]

    def with_tags(*more: bytes) -> bytes:
        tags = struct.pack("<H", count + len(more)) + own + b"".join(more) + bytes(4)
        return plain[:4] + struct.pack("<I", len(plain)) + plain[8:] + tags

    # those that microscopes and others have are not looked at, whatever they hold
    odd = with_tags(*(entry(tag, 5, 1 << 30, 8) for tag in (330, 33628, 33629, 34412, 34665, 50839)))
    np.testing.assert_array_equal(read_tiff(odd, 1)[:, :, 0], DEEP[:, :, 0])
    content = with_tags(*[entry(338, 3, 1000, 8)] * 4000) + bytes(10_000)
    read_tiff(content, 1)
    with pytest.raises(ValueError, match="tags are more than"):
        read_tiff(with_tags(*[entry(338, 3, 100_000, 8)] * 4000) + bytes(200_000), 1)
    for damaged in (entry(339, 12, 1, 8), entry(339, 3, 0, 8), entry(339, 3, 100_000, 8)):
        with pytest.raises(ValueError, match="values of a tag"):
            read_tiff(with_tags(damaged), 1)


def test_bytes_that_are_the_pixels_of_many_places() -> None:
    strips = 500
    content = tiff(np.zeros((strips, 4), np.uint8), compression="packbits", rowsperstrip=1)
    rest = np.random.default_rng(0).bytes(1000)
    starts = np.full(strips, len(content), "<u4").tobytes()
    counts = np.full(strips, len(rest), "<u4").tobytes()
    (place,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, place)
    changed = bytearray(content + rest + starts + counts)
    for at in range(place + 2, place + 2 + 12 * count, 12):
        tag = struct.unpack_from("<H", content, at)[0]
        if tag in (273, 279):
            where = len(content) + len(rest) + (len(starts) if tag == 279 else 0)
            changed[at : at + 12] = entry(tag, 4, strips, where)
    with pytest.raises(ValueError, match="of many places"):
        read_tiff(bytes(changed), 1)


def test_pages_in_a_circle() -> None:
    content = bytearray(tiff(DEEP[:, :, 0]))
    (place,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, place)
    struct.pack_into("<I", content, place + 2 + 12 * count, place)
    with pytest.raises(ValueError, match="circle"):
        read_tiff(bytes(content), 1)
    struct.pack_into("<I", content, place + 2 + 12 * count, place + 12)
    with pytest.raises(ValueError, match=r"truncated|over each other"):
        read_tiff(bytes(content), 1)


def test_damage_raises_nothing_else() -> None:
    draw = np.random.default_rng(0)
    small = bands(3, 5, 9, 11)
    sources = [
        flat(small, compression="zlib", predictor=True),
        flat(small, bigtiff=True, byteorder=">", tile=(16, 16)),
        tiff(np.ascontiguousarray(np.moveaxis(small, 2, 0)), photometric="minisblack"),
    ]
    refused = decoded = 0
    for content in sources:
        for _ in range(700):
            damaged = np.frombuffer(content, dtype=np.uint8).copy()
            where = draw.integers(min(len(content), draw.choice([40, 400, len(content)])), size=2)
            damaged[where] ^= draw.integers(1, 256, 2, dtype=np.uint8)
            try:
                assert read_tiff(damaged.tobytes(), 5).ndim == 3
                decoded += 1
            except DAMAGE:
                refused += 1
        for length in range(0, len(content), 13):
            with contextlib.suppress(*DAMAGE):  # a cut after the last pixel loses nothing
                np.testing.assert_array_equal(read_tiff(content[:length], 5), small)
    assert refused > 300
    assert decoded > 300


@pytest.mark.parametrize("rows", [4096, 4200])
def test_rows_as_pages_are_read_up_to_a_limit_that_is_told(rows: int) -> None:
    pixels = np.arange(rows * 3 * 5, dtype=np.uint16).reshape(rows, 3, 5)
    content = tiff(pixels)  # a page a row
    if rows == 4096:
        np.testing.assert_array_equal(read_tiff(content, 5), pixels)
    else:
        with pytest.raises(UnusableImageError, match=r"more than 4096 pages; .* planarconfig='contig'") as told:
            look_at_tiff(content)
        assert told.value.case == "too_large"
        np.testing.assert_array_equal(
            read_tiff(tiff(pixels, planarconfig="contig", photometric="minisblack"), 5), pixels
        )


def test_pages_in_a_circle_are_damage() -> None:
    content = bytearray(tiff(np.zeros((2, 8, 8), np.uint8), photometric="minisblack"))
    first = struct.unpack_from("<I", content, 4)[0]
    end_of_first = first + 2 + 12 * struct.unpack_from("<H", content, first)[0]
    second = struct.unpack_from("<I", content, end_of_first)[0]
    struct.pack_into("<I", content, second + 2 + 12 * struct.unpack_from("<H", content, second)[0], first)
    with pytest.raises(ValueError, match="pages go in a circle"):
        look_at_tiff(bytes(content))
