"""Sources of images for the tests of packing, and what is in the shards made of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from making import encode, picture, write_tar

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.shards.scan import INDEX_SUFFIX

CLASSES = ("ant", "bee", "cat")
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": list(CLASSES), "_type": "ClassLabel"},
    "site": {"dtype": "string", "_type": "Value"},
}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [("image", IMAGE), ("label", pa.int64()), ("site", pa.string())],
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


def make_rows(first: int, last: int) -> pa.Table:
    """Rows as `datasets` writes them; image number n has the class n % 3 and lies at the site `s{n}`."""
    return pa.Table.from_pylist(
        [
            {
                "image": {"bytes": encode(picture(number)), "path": f"img {number}.png"},
                "label": number % 3,
                "site": f"s{number}",
            }
            for number in range(first, last)
        ],
        SCHEMA,
    )


def make_parquet(folder: Path, splits: dict[str, range], files: int = 2, rows_per_group: int = 5) -> Path:
    """`data/SPLIT-00000-of-00002.parquet` and so on."""
    (folder / "data").mkdir(parents=True)
    for split, numbers in splits.items():
        for file in range(files):
            first, last = (numbers.start + len(numbers) * part // files for part in (file, file + 1))
            path = folder / f"data/{split}-{file:05d}-of-{files:05d}.parquet"
            pq.write_table(make_rows(first, last), path, row_group_size=rows_per_group)
    return folder


def make_arrow(folder: Path, splits: dict[str, range], rows_per_batch: int = 5) -> Path:
    """As `DatasetDict.save_to_disk` writes."""
    for split, numbers in splits.items():
        (folder / split).mkdir(parents=True)
        (folder / split / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
        (folder / split / "state.json").write_text(
            json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
        )
        with pa.ipc.new_stream(str(folder / split / "data-00000-of-00001.arrow"), SCHEMA) as writer:
            writer.write_table(make_rows(numbers.start, numbers.stop), max_chunksize=rows_per_batch)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def make_shards(folder: Path, splits: dict[str, range], per_shard: int = 7) -> Path:
    """WebDataset's shards with labels and json."""
    folder.mkdir(parents=True)
    for split, numbers in splits.items():
        for shard, first in enumerate(range(0, len(numbers), per_shard)):
            files = []
            for number in numbers[first : first + per_shard]:
                files += [
                    (f"img{number:04d}.png", encode(picture(number))),
                    (f"img{number:04d}.cls", str(number % 3).encode()),
                    (f"img{number:04d}.json", json.dumps({"site": f"s{number}"}).encode()),
                    (f"img{number:04d}.txt", b"a caption"),
                ]
            write_tar(folder / f"{split}-{shard:06d}.tar", files)
    (folder / "dataset.json").write_text(json.dumps({"classes": CLASSES}))
    return folder


def make_list(folder: Path, splits: dict[str, range]) -> Path:
    """Images in no order, and a CSV that says what they are."""
    folder.mkdir(parents=True)
    lines = ["site,path,split,label"]
    for split, numbers in splits.items():
        for number in numbers:
            (folder / f"{number % 4}").mkdir(exist_ok=True)
            path = f"{number % 4}/img, {number}.png"
            (folder / path).write_bytes(encode(picture(number)))
            lines.append(f's{number},"{path}",{split},{CLASSES[number % 3]}')
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder / "list.csv"


def make_folder(folder: Path, splits: dict[str, range]) -> Path:
    """Class folders with a .json beside each image."""
    for split, numbers in splits.items():
        for number in numbers:
            place = folder / split / CLASSES[number % 3]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"img{number}.png").write_bytes(encode(picture(number)))
            (place / f"img{number}.json").write_text(json.dumps({"site": f"s{number}"}))
    return folder


#: Makes a source of the same images, whatever its kind.
MAKERS = {"folder": make_folder, "tars": make_shards, "parquet": make_parquet, "arrow": make_arrow, "list": make_list}


def read_back(out: Path, split: str) -> dict[bytes, dict[str, Any]]:
    """The samples of a split by their image, as WebDataset reads them, once it is sure that we read the same."""
    shards = [str(shard) for shard in sorted(out.glob(f"{split}-*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    found = {}
    with open_dataset(out, split) as dataset:
        assert dataset.num_samples == len(samples)
        for number, sample in enumerate(samples):
            (suffix,) = {"jpg", "png", "webp", "tif", "npy"} & sample.keys()
            ours = dataset.read(number)
            label = int(sample["cls"]) if "cls" in sample else None
            assert (ours.key, ours.image, ours.label) == (sample["__key__"], sample[suffix], label)
            meta = json.loads(sample["json"]) if "json" in sample else None
            found[sample[suffix]] = {"key": ours.key, "label": label, "json": meta}
    assert len(found) == len(samples), "an image came twice"
    return found


def content(folder: Path) -> dict[str, str]:
    """A hash of every file but the indexes, which hold the shards' time of change."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(INDEX_SUFFIX))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
