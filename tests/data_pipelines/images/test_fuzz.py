"""Random damage to images and tars: only the documented errors, no hang, bounded memory."""

from __future__ import annotations

import io
import resource
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from making import encode, picture, sample_files, write_tar
from PIL import Image

from data_pipelines.datasets.bad_samples import Decoder, TooManyBadSamplesError
from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.images.issues import CASES, Severity
from data_pipelines.images.validate import validate
from data_pipelines.shards.scan import build_index, scan_shard
from data_pipelines.shards.tar import BLOCK

PIXELS = picture(5, 33, 40)
LIMIT_KIB = 600 << 10  # an image may be of MAX_PIXELS, unpacked to 4 bytes a pixel


def images() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    image = Image.fromarray(PIXELS)
    frames = {"save_all": True, "append_images": [image.rotate(90)]}
    found = {
        "jpeg": (image, "JPEG", {"exif": exif}),
        "progressive jpeg": (image, "JPEG", {"progressive": True}),
        "cmyk jpeg": (image.convert("CMYK"), "JPEG", {}),
        "mpo": (image, "MPO", frames),
        "png": (image, "PNG", {"exif": exif}),
        "palette png": (image.quantize(), "PNG", {"transparency": 3}),
        "16-bit png": (Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG", {}),
        "alpha png": (image.convert("RGBA"), "PNG", {}),
        "animated png": (image, "PNG", frames),
        "webp": (image, "WEBP", {"exif": exif}),
        "lossless webp": (image.convert("RGBA"), "WEBP", {"lossless": True}),
        "animated webp": (image, "WEBP", frames),
    }
    encoded = {}
    for name, (picture_, format, options) in found.items():
        file = io.BytesIO()
        picture_.save(file, format, **options)
        encoded[name] = file.getvalue()
    return encoded


IMAGES = images()


def damaged(content: bytes, draw: np.random.Generator) -> bytes:
    """Flipped bits, overwritten, removed or repeated stretches, or a cut; often near the start, where headers are."""
    array = np.frombuffer(content, np.uint8).copy()
    near = len(array) if draw.random() < 0.5 else min(len(array), 200)
    begin = int(draw.integers(near))
    end = min(len(array), begin + int(draw.integers(1, 40)))
    match draw.integers(6):
        case 0 | 1:
            places = draw.integers(near, size=draw.integers(1, 6))
            array[places] ^= np.uint8(1) << draw.integers(0, 8, len(places), dtype=np.uint8)
        case 2:
            array[begin:end] = draw.integers(0, 256, end - begin, dtype=np.uint8)
        case 3:
            array[begin:end] = draw.choice([0, 255])
        case 4:
            return content[:begin] + content[begin:end] * int(draw.integers(0, 5)) + content[end:]
        case 5:
            return content[:begin]
    return array.tobytes()


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.perf_counter() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LIMIT_KIB


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_used_or_refused_with_a_reason(name: str) -> None:
    assert validate(IMAGES[name]).case is None
    draw = np.random.default_rng(list(name.encode()))
    num_bad = 0
    for channels in (3, 1):
        for _ in range(150):
            verdict = validate(damaged(IMAGES[name], draw), "jpg", channels=channels)
            if verdict.case is not None:
                num_bad += 1
                assert CASES[verdict.case].severity == Severity.ERROR
                assert verdict.reason
                assert verdict.reason.isprintable()
    assert 30 < num_bad < 300


def test_random_bytes_behind_every_magic_are_refused() -> None:
    draw = np.random.default_rng(0)
    for content in IMAGES.values():
        for kept in (2, 4, 12, 16, 30):
            for size in (0, 1, 50, 2000):
                assert validate(content[:kept] + draw.bytes(size)).case is not None


def tars(folder: Path) -> list[bytes]:
    """Tars of every format, with every kind of member."""
    files = [("d/" * 60 + "ä" * 30 + ".png", encode(PIXELS[:8, :8])), *sample_files(range(3)), ("000001.json", b"{}")]
    found = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        own = [("short.png", content) if format == tarfile.USTAR_FORMAT else (name, content) for name, content in files]
        path = write_tar(folder / "whole.tar", own if format != tarfile.USTAR_FORMAT else files[1:], format)
        with tarfile.open(path, "a", format=format) as tar:
            for type in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE):
                info = tarfile.TarInfo("special.png")
                info.type = type
                tar.addfile(info)
        found.append(path.read_bytes())
    path.unlink()
    return found


def with_good_checksums(content: bytes, headers: list[int]) -> bytes:
    """So that what was damaged in a header is believed."""
    array = bytearray(content)
    for place in headers:
        block = array[place : place + BLOCK]
        if len(block) == BLOCK:
            block[148:156] = b" " * 8
            array[place + 148 : place + 156] = b"%06o\0 " % sum(block)
    return bytes(array)


def test_of_a_damaged_tar_only_what_lies_in_it_is_used(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    shard = tmp_path / "train-000000.tar"
    num_broken = 0
    for whole in tars(tmp_path):
        starts = [place for place in range(0, len(whole), BLOCK) if whole[place + 257 : place + 262] == b"ustar"]
        for turn in range(150):
            place = int(draw.choice(starts))
            content = whole[:place] + damaged(whole[place : place + BLOCK], draw) + whole[place + BLOCK :]
            if turn % 3 == 0:
                content = damaged(whole, draw)
            elif turn % 3 == 1:
                content = with_good_checksums(content, starts)
            shard.write_bytes(content)
            index, tally = scan_shard(shard)
            num_broken += bool(tally.counts)
            for row in range(len(index)):
                entry = index.entry(0, row)
                assert entry.key
                assert 0 <= entry.image_offset <= entry.image_offset + entry.image_size <= len(content)
            for case in tally.counts:
                assert tally.sentence(case).isprintable()
    assert num_broken > 150


def test_from_a_damaged_tar_to_pixels(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    whole = tars(tmp_path)[2]
    num_used = 0
    for number in range(40):
        shard = tmp_path / f"x-{number}.tar"
        shard.write_bytes(damaged(damaged(whole, draw), draw))
        if not len(build_index(shard)):
            with pytest.raises(ValueError, match="no sample in"):
                open_dataset(shard)
            continue
        with open_dataset(shard) as dataset:
            decoder = Decoder(dataset, max_bad_share=1.0)
            for sample in range(dataset.num_samples):
                try:
                    assert decoder.read(sample).picture.pixels.dtype == np.uint8
                    num_used += 1
                except TooManyBadSamplesError:
                    assert decoder.num_bad >= dataset.num_samples
    assert num_used > 50


@pytest.mark.parametrize(
    "records",
    [
        b"5 a=\n" * 200_000,
        b"9" * (1 << 20),
        b" " * (1 << 20),
        b"0 a=b\n",
        b"-5 a=b\n",
        b"6 a=b",
        b"3 =\n",
        b"1000000 a=b\n",
    ],
)
def test_extension_headers_of_no_sense_take_no_time(tmp_path: Path, records: bytes) -> None:
    records = records[: 1 << 20]
    info = tarfile.TarInfo("a.png")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    shard = tmp_path / "x.tar"
    shard.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % BLOCK) + bytes(1024))
    began = time.perf_counter()
    assert len(build_index(shard)) == 0
    assert time.perf_counter() - began < 5


def test_random_blocks_are_no_tar(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    shard = tmp_path / "x.tar"
    for size in (0, 1, 511, 512, 513, 1024, 5000):
        for content in (draw.bytes(size), bytes(size), b"\xff" * size):
            shard.write_bytes(content)
            index, tally = scan_shard(shard)
            assert len(index) == 0
            assert tally.counts.keys() & {"cut_short", "not_a_tar", "corrupt_header", "empty_shard"}
