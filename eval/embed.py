"""`selfsight embed`: features of every image of a data set, computed once, for every probe and for other programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.datasets.held_out import HELD_OUT
from data_pipelines.remote.cache_folder import gigabytes
from data_pipelines.remote.urls import redact
from data_pipelines.wording import counted
from eval.store.decode import decode_store, row_bytes
from eval.store.description import VERSION, Description, rows_per_part
from eval.store.embedding import embed_split, start_store
from eval.store.encoding import Crops, FrozenEncoder, encoder_digest
from eval.store.precision import Precision, choose_precision
from eval.target import Target, open_target
from pretrain.encoder_folder import TIMM_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable

#: The splits of a folder that `all` stands for, where they are there.
SPLITS = ("train", *HELD_OUT)


def embed(
    target: str,
    data: str,
    out: str | Path,
    *,
    split: str = "all",
    tokens: bool = False,
    npy: bool = False,
    image_size: int | None = None,
    native: bool = False,
    batch_size: int = 256,
    precision: str = "auto",
    last_blocks: int = 4,
    device: str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Description | None]:
    """Write the features of `target` on `data` into the folder `out`, or what is missing there.

    Args:
        target: As of `open_target`.
        data: Shards, labelled or not.
        out: Gets a folder a split, each a store: `parquet/part-*.parquet` and `store.json`, which says what is in them.
        split: train, val, test, or all that there are.
        tokens: Keep the patch tokens, too.
        npy: Decode the parts into arrays beside them at once, as the first reader would.
        image_size: Side of the centre crops in px; default: what the encoder was trained on.
        native: Images are seen whole and at their own shape, in at most as many patches as a square of that size has.
        precision: auto, fp32 or bf16; see `eval.store.precision`.
        last_blocks: How many blocks to keep the class token of, or the mean where there is none.
        device: Where to compute: cpu, cuda or cuda:N.
        rank: Of `world_size` processes that make the same store, each its share of the parts.

    Returns:
        The description of each split's store; None where other processes still have parts to make.

    Raises ValueError and FileNotFoundError where target, data or `out` do not allow it.
    """
    out = Path(out).expanduser()
    datasets = open_all(data, split)
    subject = open_target(target, image_size, native=native)
    chosen = choose_precision(precision, device)
    if not rank:
        say(f"computed in {chosen.arithmetic} and kept as {chosen.features}: {chosen.why}")
    crops = Crops(
        subject.image_size, subject.channels, subject.bits, subject.mean, subject.std, subject.frames,
        subject.frame_stride, subject.native,
    )  # fmt: skip
    encoder = FrozenEncoder(
        subject.encoder, crops, device=device, arithmetic=chosen.arithmetic, last_blocks=last_blocks, tokens=tokens
    )
    found: dict[str, Description | None] = {}
    plans = {name: describe(subject, encoder, dataset, name, chosen, last_blocks) for name, dataset in datasets}
    source = target if target.startswith(TIMM_PREFIX) else str(Path(target).expanduser().resolve())
    for description in plans.values():
        description.about.update(source=source, spec=redact(data))
    for name, description in plans.items():  # what other features are there is told before hours of work
        start_store(out / name, description)
    for name, dataset in datasets:
        found[name] = embed_split(
            encoder, dataset, out / name, plans[name], batch_size=batch_size, rank=rank, world_size=world_size,
            progress=progress, say=say,
        )  # fmt: skip
        say(summary(out / name, plans[name], found[name]))
        complete = found[name]
        if npy and complete is not None:
            decode_store(out / name, complete, say)
    return found


def open_all(data: str, split: str) -> list[tuple[str, Dataset]]:
    """The data sets that `split` names; raises ValueError for another word, FileNotFoundError where there is none."""
    if split not in (*SPLITS, "all"):
        raise ValueError(f"split is {split!r}; it must be all or one of {', '.join(SPLITS)}")
    folder = Path(data).expanduser()
    if split != "all" or not folder.is_dir():  # of other shards than a folder's, there are no splits to tell apart
        name = "train" if split == "all" else split
        return [(name, open_dataset(data, name))]
    there = [name for name in SPLITS if any(folder.glob(f"{name}-*.tar"))]
    return [(name, open_dataset(data, name)) for name in there or ("train",)]


def describe(
    subject: Target, encoder: FrozenEncoder, dataset: Dataset, split: str, precision: Precision, last_blocks: int
) -> Description:
    """What the store of a split will hold."""
    identity: dict[str, Any] = {
        "version": VERSION,
        "encoder": encoder_digest(subject.encoder, subject.architecture),
        "data": dataset.checksum,
        "split": split,
        "num_samples": dataset.num_samples,
        "crops": encoder.crops.as_json(),
        "arithmetic": precision.arithmetic,
        "features": precision.features,
        "layout": encoder.layout.as_json(),
        "tokens": "float16" if encoder.with_tokens else None,
        "last_blocks": last_blocks,
    }
    identity["rows_per_part"] = rows_per_part(row_bytes(identity))
    about = {
        "target": subject.name,
        "method": subject.method,
        "step": subject.step,
        "architecture": subject.architecture,
        "headline": subject.headline or encoder.layout.pooled_as,
        "classes": None if dataset.classes is None else list(dataset.classes),
        "precision_because": precision.why,
        "versions": versions(("selfsight", "torch", "timm", "pillow")),
    }
    return Description(*json.loads(json.dumps([identity, about])))  # as it is read back


def versions(names: Iterable[str]) -> dict[str, str]:
    """Of installed distributions."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:  # run from a checkout that is not installed
            found[name] = "not installed"
    return found


def summary(folder: Path, description: Description, complete: Description | None) -> str:
    """What is there now, in a line."""
    if complete is None:
        there = sum((description.path(folder, number)).is_file() for number in range(description.num_parts))
        return f"{folder}: {there} of {counted(description.num_parts, 'part')} there; other processes make the rest"
    assert complete.rows is not None
    bad = ""
    if complete.unreadable:
        named = ", ".join(complete.named[:3])
        more = ", ..." if complete.unreadable > 3 else ""
        bad = f"; {complete.unreadable:,} samples can't be read and are left out ({named}{more})"
    size = gigabytes(complete.rows * row_bytes(description.identity))
    parts, dim = counted(description.num_parts, "part"), description.layout.dim
    return f"{folder}: {complete.rows:,} images in {parts}, {size}, {dim:,} values each{bad}"
