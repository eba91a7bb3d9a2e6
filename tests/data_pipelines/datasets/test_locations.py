"""What names shards: folders, braces, globs and lists, here and at URLs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import fsspec
import pytest
from making import encode, picture, write_tar
from serving import SECRET, Server, describe, serve

from data_pipelines.checks.verify import verify
from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.datasets.dataset_index import write_index
from data_pipelines.datasets.locations import Locations, Spec
from data_pipelines.files import parse_json, write_json
from data_pipelines.remote.cache import Cache
from data_pipelines.remote.fetch import Patience
from data_pipelines.remote.remote_files import RemoteFile, Shard
from data_pipelines.remote.urls import check_names, redact

QUICK = Patience(tries=3, timeout_seconds=5, backoff_seconds=0.001)
NAMES = [f"train-{number:06d}.tar" for number in range(3)]


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    with serve(shards.parent) as running:
        yield running


@pytest.fixture
def memory(shards: Path) -> Iterator[str]:
    """The same shards on a file system that can list, with something else beside them."""
    fs = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        fs.pipe_file(f"/set/{path.name}", path.read_bytes())
    fs.pipe_file("/set/val-000000.tar", b"")
    fs.pipe_file("/set/notes.txt", b"")
    yield "memory://set"
    fs.rm("/set", recursive=True)


def find(spec: Spec, split: str = "train") -> list[Shard]:
    return Locations(Cache(patience=QUICK)).find(spec, split)


def names(spec: Spec, split: str = "train") -> list[str]:
    return [shard.name for shard in find(spec, split)]


@pytest.fixture
def described(shards: Path) -> Iterator[None]:
    describe(shards)
    yield
    (shards / "dataset.json").unlink()


def test_braces_in_a_url_ask_for_nothing_but_what_is_published_beside(server: Server) -> None:
    url = f"{server.url}/{{shards0,nowhere}}/train-{{000002,000000}}.tar"
    found = find(url.replace("shards0", "x"))
    assert [str(shard) for shard in found] == [
        f"{server.url}/{folder}/{name}" for folder in ("x", "nowhere") for name in (NAMES[2], NAMES[0])
    ]
    assert sorted(path for path, _ in server.requests) == ["/nowhere/dataset.json", "/x/dataset.json"]


@pytest.mark.usefixtures("described")
def test_a_folder_over_http_is_told_by_its_description(server: Server, shards: Path) -> None:
    for spec in (f"{server.url}/{shards.name}", f"{server.url}/{shards.name}/", f"{server.url}/{shards.name}/train-*"):
        found = find(spec)
        assert [shard.name for shard in found] == NAMES
        for shard in found:
            content = (shards / shard.name).read_bytes()
            assert isinstance(shard, RemoteFile)
            assert (shard.state.size, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert names(f"{server.url}/{shards.name}/*[12].tar") == NAMES[1:]
    with pytest.raises(FileNotFoundError, match=r"holds no val-\*\.tar; its shards begin with train"):
        find(f"{server.url}/{shards.name}", "val")


def test_a_folder_over_http_is_told_by_its_index(server: Server, shards: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot be listed over http, and neither dataset"):
        find(f"{server.url}/{shards.name}")
    place = write_index(shards, "train")
    assert place is not None
    try:
        assert names(f"{server.url}/{shards.name}") == NAMES
    finally:
        place.unlink()


def test_a_file_system_that_can_list(memory: str) -> None:
    assert names(memory) == names(f"{memory}/") == names(f"{memory}/train-*.tar") == NAMES
    assert names(f"{memory}/*") == [*NAMES, "val-000000.tar"]
    assert names(f"{memory}/train-00000[02].tar") == [NAMES[0], NAMES[2]]
    found = find(memory)
    assert all(isinstance(shard, RemoteFile) and shard.state.size and shard.state.version for shard in found)
    with pytest.raises(FileNotFoundError, match=r"memory://set holds no test-\*\.tar; its shards begin with train"):
        find(memory, "test")
    with pytest.raises(FileNotFoundError, match="no file matches memory://set/nothing"):
        find(f"{memory}/nothing*")
    with pytest.raises(FileNotFoundError, match="memory://nowhere does not exist"):
        find("memory://nowhere")
    with pytest.raises(ValueError, match=r"only the last part may hold \*"):
        find("memory://*/x.tar")


def test_lists_of_mixed_places(server: Server, shards: Path, memory: str) -> None:
    spec = [shards / NAMES[1], f"{memory}/{NAMES[0]}", f"{server.url}/{shards.name}/{NAMES[2]}"]
    found = find(spec)
    assert [isinstance(shard, Path) for shard in found] == [True, False, False]
    assert names(f"{{{shards}/{NAMES[1]},{memory}/{NAMES[0]}}}") == [NAMES[1], NAMES[0]]
    assert find(f"file://{shards}/{NAMES[0]}") == [shards / NAMES[0]]
    with open_dataset(spec) as dataset, open_dataset(shards) as local:
        order = [*range(20, 23), *range(20), *range(23, 50)]
        for sample, other in enumerate(order):
            ours, theirs = dataset.read(sample), local.read(other)
            assert (ours.key, ours.image, ours.label) == (theirs.key, theirs.image, theirs.label)


def test_commands_and_chains_are_refused() -> None:
    for spec in ("pipe:curl https://x/y.tar", "simplecache::s3://bucket/x.tar", "pipe:cat x |"):
        with pytest.raises(ValueError, match="are not run"):
            find(spec)


#: Names that no file in a folder has, as they are after decoding.
NO_NAMES = (
    "../x.tar", "/home/x.tar", "a/../../x.tar", "..\\x.tar", "c:\\x.tar", "a\0.tar", "a\n.tar", "\x1b[31m.tar",
    "\u202e.tar", "\x7f.tar", "a" * 300 + ".tar", "\xe9" * 130 + ".tar",
)  # fmt: skip


@pytest.mark.parametrize("name", NO_NAMES, ids=ascii)
def test_names_of_remote_files_stay_in_their_folder(name: str) -> None:
    """Wherever the name comes from: a URL by braces, dataset.json, a published index, a listing."""
    with pytest.raises(ValueError, match="is no name of a file in it") as raised:
        RemoteFile("http://127.0.0.1:9/set/" + quote(name, safe=""))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1500
    with pytest.raises(ValueError, match="is no name of a file in it"):
        check_names(["train-000000.tar", name], "s3://bucket/set")
    if not {"/", "\n"} & set(name):  # a URL's line breaks count as not there
        with pytest.raises(ValueError, match="is no name of a file in it"):
            RemoteFile("s3://bucket/" + name)


@pytest.mark.parametrize(
    "name", ["train-0.tar", "a b.tar", "gr\xf6\xdfe.tar", "x..tar", "...tar", "100%.tar", "%2F.tar"]
)
def test_odd_names_that_are_names_pass(name: str) -> None:
    check_names([name], "s3://bucket/set")
    assert RemoteFile("https://host/set/" + quote(name)).name == name


@pytest.mark.parametrize("way", ["verify", "open"])
@pytest.mark.parametrize("up", ["..%2F..%2Fhome%2Fx", "..%5C..%5Cx", "%2Fhome%2Fx", "a%00b", "%2e%2e%2fx"])
def test_nothing_is_written_outside_the_cache(
    server: Server, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, up: str
) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "a" / "b" / "cache"))
    spec = f"{server.url}/{shards.name}/{{train-000000,{up}}}.tar"
    with pytest.raises(ValueError, match="is no name of a file in it"):
        verify(spec, progress=False) if way == "verify" else open_dataset(spec)
    assert {path.name for path in tmp_path.iterdir()} <= {"a"}
    assert not any("%" in path for path, _ in server.requests)


def test_a_checksum_that_is_none_names_no_file() -> None:
    with pytest.raises(ValueError, match="SHA-256 is told as"):
        RemoteFile("https://host/x.tar", sha256="../../" + "0" * 58)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a":' * 100_000, b'{"splits": ' + b"[" * 5000 + b"]" * 5000 + b"}"]
)
def test_json_of_strangers_that_is_nested_too_deep_is_refused_in_words(
    server: Server, shards: Path, tmp_path: Path, text: bytes
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / NAMES[0]).write_bytes((shards / NAMES[0]).read_bytes())
    for place in (tmp_path / "set" / "dataset.json", shards / "dataset.json"):
        place.write_bytes(text)
    try:
        for way in (find, lambda spec: verify(spec, progress=False), open_dataset):
            with pytest.raises(ValueError, match=r"dataset\.json is not JSON \(its values are nested too deep"):
                way(f"{server.url}/{shards.name}")
        for way in (lambda spec: verify(spec, progress=False), open_dataset):
            with pytest.raises(ValueError, match=r"dataset\.json is not JSON \(its values are nested too deep"):
                way(tmp_path / "set")
        deep = write_tar(tmp_path / "x-000001.tar", [("a.png", encode(picture(1))), ("a.json", text)])
        assert verify(deep, progress=False)["cases"]["bad_json"]["count"] == 1
        with pytest.raises(ValueError, match="nested too deep"):
            parse_json(text)
    finally:
        (shards / "dataset.json").unlink()


def test_json_that_can_be_read_and_not_written_is_refused_in_words(tmp_path: Path) -> None:
    deep: list = []
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deep"):
        write_json(tmp_path / "x.json", deep)
    assert not list(tmp_path.iterdir())


def test_a_description_is_not_taken_at_its_word(server: Server, shards: Path) -> None:
    url, place = f"{server.url}/{shards.name}", shards / "dataset.json"
    try:
        describe(shards, name="../../train-x.tar")
        with pytest.raises(ValueError, match="is no name of a file in it"):
            find(url)
        for text, told in (("{", "is not JSON"), ('{"splits": {"train": 3}}', "is no description")):
            place.write_text(text)
            with pytest.raises(ValueError, match=told):
                find(url)
    finally:
        place.unlink()


def test_listed_with_another_size_than_described(memory: str) -> None:
    entry = {"name": NAMES[0], "bytes": 17, "sha256": "0" * 64}
    description = json.dumps({"splits": {"train": {"shards": [entry]}}}).encode()
    fsspec.filesystem("memory").pipe_file("/set/dataset.json", description)
    with pytest.raises(ValueError, match=r"has \d+ bytes, and 17 by dataset\.json"):
        find(memory)


def test_what_opens_a_place_is_hidden() -> None:
    for text, shown in {
        f"https://me:{SECRET}@host:8/set/x.tar": "https://***@host:8/set/x.tar",
        f"https://host/x.tar?sig={SECRET}&a=1": "https://host/x.tar?***",
        f"got 500 from 'https://me:{SECRET}@host/x?y={SECRET}', again": "got 500 from 'https://***@host/x?***', again",
        f"{{https://a:{SECRET}@h/x,s3://b:{SECRET}@k/y}}.tar": "{https://***@h/x,s3://***@k/y}.tar",
        "https://host/a, me@host": "https://host/a, me@host",
        "hf://datasets/user/name@main/x.tar": "hf://datasets/user/name@main/x.tar",
        "/local/x-?.tar": "/local/x-?.tar",
    }.items():
        assert redact(text) == shown


def test_secrets_are_in_no_checksum(server: Server, shards: Path) -> None:
    with_secret = server.url.replace("http://", f"http://user:{SECRET}@")
    specs = [f"{url}/{shards.name}/{{{','.join(NAMES)}}}?t={SECRET}" for url in (server.url, with_secret)]
    with open_dataset(specs[0]) as plain, open_dataset(specs[1]) as secret, open_dataset(shards) as local:
        assert plain.checksum == secret.checksum == local.checksum
        assert SECRET not in str(secret.key(0)) + str(secret.shards) + repr(secret.shards)
