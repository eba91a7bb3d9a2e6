"""Whose pack a folder of shards holds: agreed before a byte is written, so that nothing of others is touched."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from data_pipelines.datasets.dataset_index import joint_place
from data_pipelines.datasets.description import read_description
from data_pipelines.files import TEMPORARY_SUFFIX, lock, read_json, write_json
from data_pipelines.shards.scan import INDEX_SUFFIX

WORK = ".pack"  # in the folder of shards while a pack is under way: its plan, and a receipt for every finished shard
SKIPPED = "skipped.jsonl"
_DOOMED = "doomed.json"  # in it: shards whose removal has begun
_SHARD_NAME = re.compile(r"[^/.][^/]*-[0-9]{6}\.tar")


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold the folder against a second pack; the kernel lets go when the process ends, however it does."""
    place = out / ".pack.lock"  # removed again when the pack ends
    with place.open("wb") as file:
        if not lock(file) or not _is_at(file, place):
            raise FileExistsError(f"another pack is writing into {out}; wait for it, or take another folder")
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


def _is_at(file: BinaryIO, place: Path) -> bool:
    """Whether an open file is still the one of that name: another pack may have removed it before it was locked."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), place.stat())
    except FileNotFoundError:
        return False


def agree(out: Path, plan: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Settle whether to begin (None), to go on (None) or that all is done (the result)."""
    for leftover in out.glob(f".*{TEMPORARY_SUFFIX}"):  # of a call that was killed
        leftover.unlink()
    _finish_removal(out)
    result, begun = read_json(out / "dataset.json"), read_json(out / WORK / "plan.json")
    earlier = result["pack"] if isinstance(result, dict) and isinstance(result.get("pack"), dict) else begun
    if overwrite and earlier is not None and (earlier != plan or result is not None):
        _remove_pack(out)
        earlier = result = None
    if result is None and not any((out / WORK).glob("*.begun")):
        earlier = None  # a plan of which nothing was written, as for want of space, binds nobody
    if earlier is None:
        if result is not None or any(out.glob("*.tar")):
            raise FileExistsError(f"{out} holds shards that `selfsight pack` did not write; take another folder")
        (out / WORK).mkdir(exist_ok=True)
        write_json(out / WORK / "plan.json", plan)
        return None
    differences = [name for name in plan if plan[name] != earlier.get(name)]
    if differences:
        told = "; ".join(
            "the images are others" if name == "source" else f"{name} is {plan[name]!r}, there {earlier.get(name)!r}"
            for name in differences
        )
        state = "holds" if result is not None else "holds part of"
        raise FileExistsError(f"{out} {state} another pack: {told}. Take another folder, or overwrite (--overwrite)")
    return result


def _remove_pack(out: Path) -> None:
    """Remove the shards that earlier packs wrote here, and nothing else; a call that is killed is taken up again."""
    result = read_description(out)
    own = {path.stem for path in (out / WORK).glob("*.begun")}
    if result is not None:
        own |= {shard["name"] for entry in result.get("splits", {}).values() for shard in entry["shards"]}
    (out / WORK).mkdir(exist_ok=True)
    write_json(out / WORK / _DOOMED, sorted(own))
    _finish_removal(out)


def _finish_removal(out: Path) -> None:
    doomed = read_json(out / WORK / _DOOMED)
    if doomed is None:
        return
    foreign = [name for name in doomed if not _SHARD_NAME.fullmatch(name)]
    if foreign:  # the folder may come from a stranger
        raise ValueError(
            f"{out} says that pack wrote {foreign[0]!r}, which is no name of a shard; nothing was removed. "
            "Take another folder, or remove this one by hand"
        )
    (out / "dataset.json").unlink(missing_ok=True)  # first: without it nothing looks finished
    (out / "verify.json").unlink(missing_ok=True)
    (out / SKIPPED).unlink(missing_ok=True)
    for name in doomed:
        (out / f"{name}{INDEX_SUFFIX}").unlink(missing_ok=True)
        joint_place(out, name.rpartition("-")[0]).unlink(missing_ok=True)
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / WORK)


def receipt_path(out: Path, shard: str) -> Path:
    return out / WORK / f"{shard}.json"


def read_receipt(out: Path, shard: str) -> dict[str, Any] | None:
    """The receipt of a shard that an earlier call finished, and which is still as it left it."""
    receipt = read_json(receipt_path(out, shard))
    path = out / shard
    return receipt if receipt and path.is_file() and path.stat().st_size == receipt["bytes"] else None
