"""Every case of bad data: what the index says of it, what is decoded, what a batch shows, what verify reports.

Each case is made on the fly. `IMAGES` are files that lie as sample 000001 between two good ones; `SHARDS` are tars.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import resource
import struct
import tarfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import webdataset
from making import bands, deep_png, encode, npy, picture, sample_files, tiff, write_tar
from PIL import Image

from data_pipelines.checks.verify import verify
from data_pipelines.datasets.bad_samples import BadSampleLog
from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.images.decode import BadSampleError, decode
from data_pipelines.images.issues import CASES, Severity
from data_pipelines.images.sample import Sample
from data_pipelines.images.validate import validate
from data_pipelines.loader import Loader
from data_pipelines.sampler import Sampler
from data_pipelines.shards.scan import build_index
from data_pipelines.transforms.config import Crop, Views

PIXELS = picture(1)
GREY = np.asarray(Image.fromarray(PIXELS).convert("L"))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def frames(format: str, **options: Any) -> bytes:
    first, *others = (Image.fromarray(picture(seed)) for seed in (1, 2, 3))
    return saved(first, format, save_all=True, append_images=others, **options)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says it is of this size; its pixels are too few."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(bytes(3000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(text)) + kind + text + struct.pack(">I", zlib.crc32(kind + text)) for kind, text in parts
    )


def pages(*pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in pixels:
            writer.write(page)
    return file.getvalue()


def patched(content: bytes, marker: bytes, offset: int, new: bytes) -> bytes:
    place = content.index(marker) + offset
    return content[:place] + new + content[place + len(new) :]


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(Image.fromarray(PIXELS), "PNG", exif=exif)


def of_many_scans() -> bytes:
    content = saved(Image.fromarray(PIXELS), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + 200 * content[last:-2] + content[-2:]


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(PIXELS).convert("RGB" if mode == "RGBA" else "L")
    image.putalpha(Image.fromarray(np.where(np.arange(24) < 12, 0, 255)[None].repeat(20, 0).astype(np.uint8)))
    return image


JPEG = encode(PIXELS, "JPEG", quality=95)
PNG = encode(PIXELS)
DEEP = np.linspace(0, 65535, 20 * 24).reshape(20, 24).astype(np.uint16)
ON_BLACK = np.where((np.arange(24) < 12)[None, :, None], 0, PIXELS)
CLOSE = 6  # mean difference in levels that JPEG and conversions may make


@dataclass
class ImageCase:
    """A file and what becomes of it: its pixels (to within `CLOSE` if not `exact`), or the error."""

    content: bytes
    error: str | None = None
    pixels: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    suffix: str = "png"
    exact: bool = True


IMAGES: dict[str, ImageCase] = {
    # used
    "png": ImageCase(PNG, pixels=PIXELS),
    "jpeg": ImageCase(JPEG, pixels=PIXELS, suffix="jpg", exact=False),
    "upper-case suffix": ImageCase(JPEG, pixels=PIXELS, suffix="JPG", exact=False),
    "progressive": ImageCase(
        encode(PIXELS, "JPEG", quality=95, progressive=True), pixels=PIXELS, suffix="jpeg", exact=False
    ),
    "grey jpeg": ImageCase(encode(GREY, "JPEG"), pixels=np.dstack([GREY] * 3), suffix="jpg", exact=False),
    "1 bit": ImageCase(
        saved(Image.fromarray(GREY).convert("1"), "PNG"),
        pixels=np.asarray(Image.fromarray(GREY).convert("1").convert("RGB")),
    ),
    "1 px": ImageCase(encode(PIXELS[:1, :1]), pixels=PIXELS[:1, :1], notes=("tiny",)),
    "1 px wide": ImageCase(encode(PIXELS[:, :1]), pixels=PIXELS[:, :1], notes=("tiny",)),
    "cmyk": ImageCase(
        saved(Image.fromarray(PIXELS).convert("CMYK"), "JPEG", quality=95),
        pixels=PIXELS,
        notes=("cmyk",),
        suffix="jpg",
        exact=False,
    ),
    "rgba": ImageCase(saved(with_alpha("RGBA"), "PNG"), pixels=ON_BLACK, notes=("transparent",)),
    "grey with alpha": ImageCase(
        saved(with_alpha("LA"), "PNG"),
        pixels=np.where((np.arange(24) < 12)[None, :, None], 0, GREY[:, :, None]).repeat(3, 2),
        notes=("transparent",),
    ),
    "palette": ImageCase(
        saved(Image.fromarray(PIXELS).quantize(256), "PNG"), pixels=PIXELS, notes=("palette",), exact=False
    ),
    "16 bit": ImageCase(encode(DEEP), pixels=np.dstack([DEEP >> 8] * 3), notes=("deep",), exact=False),
    "turned": ImageCase(turned(6), pixels=np.rot90(PIXELS, -1), notes=("turned",)),
    "mirrored": ImageCase(turned(2), pixels=PIXELS[:, ::-1], notes=("turned",)),
    "orientation that is none": ImageCase(turned(77), pixels=PIXELS),
    "damaged exif": ImageCase(saved(Image.fromarray(PIXELS), "PNG", exif=b"Exif\0\0II*\0\xff\xff"), pixels=PIXELS),
    "animated webp": ImageCase(frames("WEBP", lossless=True), pixels=PIXELS, notes=("animated",), suffix="webp"),
    "animated png": ImageCase(frames("PNG"), pixels=PIXELS, notes=("animated",)),
    "several jpegs in one": ImageCase(
        frames("MPO", quality=95), pixels=PIXELS, notes=("animated",), suffix="jpg", exact=False
    ),
    "png under jpg": ImageCase(PNG, pixels=PIXELS, notes=("wrong_suffix",), suffix="jpg"),
    "jpeg under webp": ImageCase(JPEG, pixels=PIXELS, notes=("wrong_suffix",), suffix="webp", exact=False),
    "tiff": ImageCase(tiff(PIXELS), pixels=PIXELS, suffix="tif"),
    "16-bit tiff": ImageCase(tiff(DEEP), pixels=np.dstack([DEEP >> 8] * 3), notes=("deep",), suffix="tiff"),
    "16-bit rgb png": ImageCase(deep_png(bands(1, 3)), pixels=bands(1, 3) >> 8, notes=("deep",)),
    "npy": ImageCase(npy(PIXELS), pixels=PIXELS, suffix="npy"),
    "npy under png": ImageCase(npy(PIXELS), pixels=PIXELS, notes=("wrong_suffix",)),
    "several pages": ImageCase(pages(PIXELS, PIXELS[::-1]), pixels=PIXELS, notes=("animated",), suffix="tif"),
    "infrared as opacity": ImageCase(
        tiff(np.full((20, 24, 4), 100, np.uint8), photometric="rgb"),
        pixels=np.full((20, 24, 3), round(100 * 100 / 255), np.uint8),
        notes=("transparent", "odd_opacity"),
        suffix="tif",
    ),
    "a transparent colour": ImageCase(
        saved(Image.fromarray(ON_BLACK), "PNG", transparency=(0, 0, 0)), pixels=ON_BLACK, notes=("transparent",)
    ),
    # replaced
    "13 bands": ImageCase(tiff(bands(1), planarconfig="contig"), "other_channels", suffix="tif"),
    "13 bands in an array": ImageCase(npy(bands(1)), "other_channels", suffix="npy"),
    "an array of which no axis is it": ImageCase(npy(np.zeros((3, 9, 3), np.uint8)), "other_channels", suffix="npy"),
    "an array of features": ImageCase(npy(np.zeros((3, 9, 3), np.float32)), "other_format", suffix="npy"),
    "a TIFF of floats": ImageCase(tiff(PIXELS.astype(np.float32)), "other_format", suffix="tif"),
    "truncated tiff": ImageCase(tiff(PIXELS)[:1000], "damaged_image", suffix="tif"),
    "truncated npy": ImageCase(npy(PIXELS)[:1000], "damaged_image", suffix="npy"),
    "truncated 16-bit png": ImageCase(deep_png(bands(1, 3))[:1000], "damaged_image"),
    "gigapixel npy": ImageCase(npy(PIXELS).replace(b"(20, 24, 3)", b"(99999, 99999, 3)"), "too_large", suffix="npy"),
    "zero bytes": ImageCase(b"", "empty_image"),
    "truncated png": ImageCase(PNG[: len(PNG) // 2], "damaged_image"),
    "truncated jpeg": ImageCase(JPEG[: len(JPEG) // 2], "damaged_image", suffix="jpg"),
    "jpeg without its end": ImageCase(JPEG[:-2], "damaged_image", suffix="jpg"),
    "a jpeg's first bytes": ImageCase(JPEG[:3], "damaged_image", suffix="jpg"),
    "flipped bits": ImageCase(patched(PNG, b"IDAT", 20, b"\0\0\0\0"), "damaged_image"),
    "gif under jpg": ImageCase(encode(PIXELS, "GIF"), "other_format", suffix="jpg"),
    "bmp": ImageCase(encode(PIXELS, "BMP"), "other_format"),
    "heic": ImageCase(b"\0\0\0\x18ftypheic" + bytes(1000), "other_format", suffix="jpg"),
    "avif": ImageCase(b"\0\0\0\x18ftypavif" + bytes(1000), "other_format", suffix="jpg"),
    "web page": ImageCase(b"\n<!DOCTYPE html><title>404</title>", "not_an_image", suffix="jpg"),
    "video": ImageCase(b"\0\0\0\x18ftypmp42" + bytes(1000), "not_an_image", suffix="jpg"),
    "git lfs pointer": ImageCase(b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "not_an_image"),
    "zeros": ImageCase(bytes(3000), "not_an_image"),
    "12-bit jpeg": ImageCase(patched(JPEG, b"\xff\xc0", 4, b"\x0c"), "damaged_image", suffix="jpg"),
    "jpeg of no size": ImageCase(patched(JPEG, b"\xff\xc0", 5, bytes(4)), "damaged_image", suffix="jpg"),
    "gigapixel jpeg": ImageCase(patched(JPEG, b"\xff\xc0", 5, b"\xff" * 4), "too_large", suffix="jpg"),
    "gigapixel png": ImageCase(png(100_000, 100_000), "too_large"),
    "just too many pixels": ImageCase(png(9_500, 9_500), "too_large"),
    "absurd png": ImageCase(png(2**31 - 1, 2**31 - 1), "too_large"),
    "bomb of text": ImageCase(png(24, 20, (b"zTXt", b"a\0\0" + zlib.compress(bytes(20 << 20)))), "damaged_image"),
    "jpeg of 200 scans": ImageCase(of_many_scans(), "too_large", suffix="jpg"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = IMAGES[name]
    files = sample_files(range(3))
    files[2] = (f"000001.{case.suffix}", case.content)
    shard = write_tar(tmp_path / "train-000000.tar", files)

    index = build_index(shard)
    assert index.keys == ("000000", "000001", "000002")
    assert index.labels.tolist() == [0, 1, 2]
    assert not index.problems

    verdict = validate(case.content, case.suffix, channels=3)
    assert (verdict.case, verdict.notes) == (case.error, case.notes)

    with open_dataset(tmp_path) as dataset:
        if case.error is None:
            assert case.pixels is not None
            found = decode(dataset.read(1))
            assert found.shape == case.pixels.shape
            assert found.dtype == np.uint8
            difference = np.abs(found.astype(int) - case.pixels.astype(int))
            assert difference.max() == 0 if case.exact else difference.mean() < CLOSE
        else:
            with pytest.raises(BadSampleError, match=r"sample 000001 of .*train-000000\.tar: ") as raised:
                decode(dataset.read(1))
            assert raised.value.case == case.error
        check_loader(dataset, [0, 1, 2] if case.error is None else [0, 2, 2], tmp_path / "bad.jsonl", caplog)

    report = verify(shard, channels=3, progress=False)
    expected = {case.error: 1} if case.error else dict.fromkeys(case.notes, 1)
    assert {found: entry["count"] for found, entry in report["cases"].items()} == expected
    assert report["ok"] == (case.error is None)
    assert report["num_bad"] == (case.error is not None)
    for entry in report["cases"].values():
        assert [(e["shard"], e["key"]) for e in entry["examples"]] == [("train-000000.tar", "000001")]
    assert all(CASES[note].severity == Severity.NOTE for note in case.notes)


def check_loader(dataset: Dataset, shown: Sequence[int], log: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two passes show these samples with their labels; what is replaced is counted each time and told once."""
    caplog.clear()
    views = Views(global_crops=(Crop(size=16),))
    loader = Loader(
        Sampler((dataset,), seed=0, batch_size=3), views, threads=2, max_bad_share=0.9, bad_samples=BadSampleLog(log)
    )
    with loader:
        batches = loader.steps()
        for _ in range(2):
            (batch,) = next(batches)
            assert sorted(batch["ids"][:, 1].tolist()) == sorted(shown)
            assert batch["labels"].tolist() == batch["ids"][:, 1].tolist()
        batches.close()
        num_bad = 3 - len(set(shown))
        assert loader.num_bad >= 2 * num_bad
    messages = [record.getMessage() for record in caplog.records]
    assert sum("000001" in message and message.endswith("is shown instead") for message in messages) == num_bad
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    assert [(line["key"], line["instead"]) for line in lines] == [("000001", "000002")] * num_bad


def test_a_bomb_takes_neither_time_nor_memory() -> None:
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("gigapixel jpeg", "gigapixel png", "just too many pixels", "absurd png", "bomb of text"):
        assert validate(IMAGES[name].content).case is not None
    assert time.perf_counter() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_cut_at_every_byte_an_image_is_bad_or_whole(format: str) -> None:
    content = encode(picture(4, 9, 11), format)
    whole = decode_bytes(content)
    for end in range(len(content)):
        verdict = validate(content[:end])
        if verdict.case is None:  # all pixels were there
            assert end >= len(content) - 20  # what is cut are checksums and the end mark
            np.testing.assert_array_equal(decode_bytes(content[:end]), whole)
        else:
            assert verdict.case in ("empty_image", "damaged_image", "not_an_image")
            assert verdict.reason


def decode_bytes(content: bytes) -> np.ndarray:
    return decode(Sample("k", Path("s.tar"), content, None))


def member(
    name: str, content: bytes = b"", type: bytes = tarfile.REGTYPE, format: int = tarfile.USTAR_FORMAT, **fields: Any
) -> bytes:
    """One member of a tar; `fields` may say what is not so."""
    info = tarfile.TarInfo(name)
    info.type, info.size = type, len(content)
    for field_name, value in fields.items():
        setattr(info, field_name, value)
    return info.tobuf(format, errors="surrogateescape") + content + bytes(-len(content) % 512)


def sample(key: str, label: int = 0) -> bytes:
    return member(f"{key}.png", PNG) + member(f"{key}.cls", str(label).encode())


def gnu_sparse(name: str, num_blocks: int) -> bytes:
    """A sparse file of GNU tar's old form, whose map goes on for some blocks after the header."""
    header = bytearray(member(name, bytes(512), type=b"S", format=tarfile.GNU_FORMAT)[:512])
    header[482] = num_blocks > 0
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    maps = b"".join(bytes(504) + bytes([number + 1 < num_blocks]) + bytes(7) for number in range(num_blocks))
    return bytes(header) + maps + bytes(512)


END = bytes(1024)
GOOD = sample("a", 1) + sample("b", 2)


@dataclass
class ShardCase:
    """A shard, which keys and labels are used of it, and what verify finds."""

    content: bytes
    labels: dict[str, int]
    found: dict[str, int] = field(default_factory=dict)
    #: The keys that WebDataset's library makes of it, or part of the error it ends with; None: not looked at.
    webdataset: tuple[str, ...] | str | None = None


A_B = {"a": 1, "b": 2}
SHARDS: dict[str, ShardCase] = {
    # tars
    "good": ShardCase(GOOD + END, A_B, webdataset=("a", "b")),
    "no bytes": ShardCase(b"", {}, {"cut_short": 1, "empty_shard": 1}),
    "no member": ShardCase(bytes(10240), {}, {"empty_shard": 1}, webdataset=()),
    "text": ShardCase(b"not a tar at all\n" * 100, {}, {"not_a_tar": 1}),
    "web page": ShardCase(b"<html>404</html>", {}, {"not_a_tar": 1}),
    "gzip": ShardCase(gzip.compress(GOOD + END), {}, {"not_a_tar": 1}, webdataset=("a", "b")),
    "cut between members": ShardCase(sample("a", 1), {"a": 1}, {"cut_short": 1}, webdataset=("a",)),
    "cut in a header": ShardCase(GOOD[:-700], A_B | {"b": -1}, {"cut_short": 1, "no_label": 1}),
    "cut in an image": ShardCase(sample("a", 1) + sample("b")[:700], {"a": 1}, {"cut_short": 1}),
    "no end marker": ShardCase(GOOD, A_B, {"cut_short": 1}, webdataset=("a", "b")),
    "half an end marker": ShardCase(GOOD + bytes(512), A_B, webdataset=("a", "b")),
    "corrupt header": ShardCase(
        sample("a", 1) + b"x" + sample("b")[1:] + END, {"a": 1}, {"corrupt_header": 1}, webdataset=("a",)
    ),
    "junk after the end": ShardCase(GOOD + END + b"junk" * 300, A_B, {"junk_after_end": 1}, webdataset=("a", "b")),
    "a second tar after the end": ShardCase(
        GOOD + END + sample("c") + END, A_B, {"more_after_end": 1}, webdataset=("a", "b")
    ),
    "a size beyond the file": ShardCase(
        sample("a", 1) + member("b.png", PNG, size=8**11 - 1) + END, {"a": 1}, {"cut_short": 1}
    ),
    "a size beyond all files": ShardCase(
        sample("a", 1) + member("b.png", PNG, format=tarfile.GNU_FORMAT, size=2**80) + END, {"a": 1}, {"cut_short": 1}
    ),
    "a pax size that is none": ShardCase(
        sample("a", 1) + member("b.png", PNG, format=tarfile.PAX_FORMAT, pax_headers={"size": "-512"}) + END,
        {"a": 1},
        {"corrupt_header": 1},
    ),
    "a name of two million letters": ShardCase(
        sample("a", 1) + member("b" * 2_000_000 + ".png", PNG, format=tarfile.GNU_FORMAT) + END,
        {"a": 1},
        {"corrupt_header": 1},
    ),
    # members that are no files
    "folders": ShardCase(member("f", type=tarfile.DIRTYPE) + member("f.png", type=tarfile.DIRTYPE) + GOOD + END, A_B),
    "links": ShardCase(
        member("c.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        + member("d.png", type=tarfile.LNKTYPE, linkname="a.png", size=4096)
        + GOOD
        + END,
        A_B,
        {"special_member": 2},
        webdataset=("a", "b"),
    ),
    "device": ShardCase(member("c.png", type=tarfile.CHRTYPE) + GOOD + END, A_B, {"special_member": 1}),
    "sparse": ShardCase(gnu_sparse("c.png", 0) + gnu_sparse("d.png", 3) + GOOD + END, A_B, {"special_member": 2}),
    "sparse by pax": ShardCase(
        member("c.png", PNG, format=tarfile.PAX_FORMAT, pax_headers={"GNU.sparse.major": "1"}) + GOOD + END,
        A_B,
        {"special_member": 1},
    ),
    # names
    "long name by gnu": ShardCase(
        member("d/" * 150 + "c.png", PNG, format=tarfile.GNU_FORMAT) + END, {"d/" * 150 + "c": -1}, {"odd_name": 1}
    ),
    "long name by pax": ShardCase(
        member("d/" * 90 + "c.png", PNG, format=tarfile.PAX_FORMAT) + END, {"d/" * 90 + "c": -1}
    ),
    "not utf-8": ShardCase(member("\udcff\udcfe.png", PNG) + END, {"\udcff\udcfe": -1}, {"odd_name": 1}),
    "path traversal": ShardCase(
        member("../../evil.png", PNG) + member("/etc/evil.png", PNG) + END,
        {"../../evil": -1, "/etc/evil": -1},
        {"odd_name": 2},
        webdataset=("../../evil", "/etc/evil"),
    ),
    "terminal escapes": ShardCase(
        member("\x1b]0;evil\x07\x1b[31m\n.png", PNG) + END, {"\x1b]0;evil\x07\x1b[31m\n": -1}, {"odd_name": 1}
    ),
    "nul in a pax name": ShardCase(
        member("x.png", PNG, format=tarfile.PAX_FORMAT, pax_headers={"path": "c.png\0.exe"}) + END, {"c": -1}
    ),
    "no key": ShardCase(member(".png", PNG) + member("._a.png", b"mac") + GOOD + END, A_B, {"no_key": 2}),
    "upper case": ShardCase(member("C.PNG", PNG) + member("C.CLS", b"4") + END, {"C": 4}, webdataset=("C",)),
    "dots": ShardCase(
        member("i_0.5x.png", PNG) + member("i_0.7x.png", PNG) + END,
        {"i_0": -1},
        {"repeated_member": 1},
        webdataset=("i_0",),
    ),
    # what lies under a key
    "an image twice": ShardCase(
        member("a.png", PNG) + member("a.png", PNG) + END, {"a": -1}, {"repeated_member": 1}, webdataset="duplicate"
    ),
    "two images": ShardCase(
        member("a.png", PNG) + member("a.jpg", JPEG) + END, {"a": -1}, {"repeated_member": 1}, webdataset=("a",)
    ),
    "a key that comes again": ShardCase(
        GOOD + member("a.cls", b"7") + END, A_B, {"repeated_member": 1}, webdataset=("a", "b", "a")
    ),
    "members that lie apart": ShardCase(
        member("a.png", PNG) + sample("b", 2) + member("a.cls", b"1") + END, A_B, webdataset=("a", "b", "a")
    ),
    "a map beside the image": ShardCase(member("a.depth.png", b"") + sample("a", 1) + END, {"a": 1}),
    "label without image": ShardCase(GOOD + member("c.cls", b"3") + END, A_B, {"no_image": 1}),
    "metadata without image": ShardCase(GOOD + member("c.json", b"{}") + END, A_B, {"no_image": 1}),
    "image without label": ShardCase(GOOD + member("c.png", PNG) + END, A_B | {"c": -1}, {"no_label": 1}),
    "image of an unknown suffix": ShardCase(GOOD + member("c.gif", encode(PIXELS, "GIF")) + END, A_B, {"no_image": 1}),
    "json that is none": ShardCase(GOOD + member("b.json", b"{'a': 1}") + END, A_B, {"bad_json": 1}),
    "json of no end": ShardCase(GOOD + member("b.json", b"[" * 100_000) + END, A_B, {"bad_json": 1}),
    "json twice": ShardCase(GOOD + 2 * member("b.json", b"{}") + END, A_B, {"repeated_member": 1}),
} | {
    f"label {label!r}": ShardCase(sample("a", 1) + member("b.png", PNG) + member("b.cls", label) + END, labels, found)
    for label, labels, found in [
        (b" 2\n", A_B, {}),
        (b"cat", {"a": 1, "b": -1}, {"bad_label": 1}),
        (b"-1", {"a": 1, "b": -1}, {"bad_label": 1}),
        (b"2.0", {"a": 1, "b": -1}, {"bad_label": 1}),
        (b"", {"a": 1, "b": -1}, {"bad_label": 1}),
        (b"2" + b" " * 40 + b"3", {"a": 1, "b": -1}, {"bad_label": 1}),
        (b"9" * 30, {"a": 1, "b": -1}, {"bad_label": 1}),
        ("\u0662".encode(), {"a": 1, "b": -1}, {"bad_label": 1}),
    ]
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_shard(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = SHARDS[name]
    shard = tmp_path / "train-000001.tar"
    shard.write_bytes(case.content)

    index = build_index(shard)
    assert dict(zip(index.keys, index.labels.tolist(), strict=True)) == case.labels
    errors = [found for found in case.found if CASES[found].severity == Severity.ERROR]
    assert len(index.problems) == len(errors)

    write_tar(tmp_path / "train-000000.tar", [("good.png", PNG)])
    with caplog.at_level(logging.WARNING), open_dataset(tmp_path) as dataset:
        assert dataset.num_samples == 1 + len(case.labels)
        for number in range(dataset.num_samples):
            np.testing.assert_array_equal(decode(dataset.read(number)), PIXELS)
    assert ("problems" in caplog.text) == bool(errors)

    report = verify(shard, progress=False)
    assert {found: entry["count"] for found, entry in report["cases"].items()} == case.found
    assert report["ok"] == (not errors)
    told = json.dumps(report, ensure_ascii=False) + caplog.text.replace("\n", "")
    assert all(letter.isprintable() for letter in told), "nothing of a stranger's reaches the terminal as it is"

    if case.webdataset is not None:
        samples = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)
        if isinstance(case.webdataset, str):
            with pytest.raises(ValueError, match=case.webdataset):
                list(samples)
        else:
            assert tuple(found["__key__"] for found in samples) == case.webdataset
    assert {path.name for path in tmp_path.iterdir()} <= {
        *(f"train-00000{number}.tar{suffix}" for number in (0, 1) for suffix in ("", ".index")),
        "verify.json",
        "train.index",
    }


def test_every_case_is_made_here_or_in_the_tests_of_verify() -> None:
    made = {case.error for case in IMAGES.values()} | {note for case in IMAGES.values() for note in case.notes}
    made |= {found for case in SHARDS.values() for found in case.found}
    of_verify = {
        "bad_map",
        "foreign_index",
        "label_out_of_range",
        "missing_shard",
        "mixed_channels",
        "no_map",
        "other_bytes",
        "other_counts",
        "other_frames",
        "repeated_key",
        "same_shard",
        "stale_index",
        "unlisted_shard",
        "unreadable",
    }
    assert made - {None} == set(CASES) - of_verify


def test_a_film_under_the_name_of_an_image_is_a_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 GB: more than the system reads at once, which must not look as if the shard had shrunk."""
    for module in ("images.pixels", "datasets.dataset", "checks.verify"):
        monkeypatch.setattr(f"data_pipelines.{module}.MAX_FILE_BYTES", 1 << 20)
    film = tarfile.TarInfo("b.jpg")
    film.size = 3 << 30
    last = tmp_path / "last.tar"
    write_tar(last, [("c.png", encode(picture(2)))])
    tar = write_tar(tmp_path / "train-000000.tar", [("a.png", encode(picture(1)))])
    with tar.open("r+b") as file:
        file.seek(512 + -(-len(encode(picture(1))) // 512) * 512)  # where the end marker begins
        file.truncate()
        file.write(film.tobuf(tarfile.USTAR_FORMAT))
        file.seek(film.size, 1)  # a hole, which takes no room
        file.write(last.read_bytes())
    with open_dataset(tmp_path, "train") as dataset:
        assert dataset.num_samples == 3
        with pytest.raises(BadSampleError, match="a file of more than 1,048,576 bytes") as raised:
            decode(dataset.read(1))
        assert raised.value.case == "too_large"
        assert decode(dataset.read(2)).shape[2] == 3
    assert verify(tmp_path, progress=False)["cases"]["too_large"]["count"] == 1
