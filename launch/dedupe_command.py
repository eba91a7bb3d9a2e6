"""What `selfsight data dedupe` does besides finding: opening splits, encoders' features, a sheet, a summary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_pipelines.checks.contact_sheet import Display, Tile, fitted, grid
from data_pipelines.checks.dedupe import DEFAULT_RADIUS, HELD_OUT, KINDS, FindNear, Found, NearByHash, Splits, dedupe
from data_pipelines.checks.fingerprint import Fingerprints
from data_pipelines.checks.neighbours import Pairs, cosine_pairs
from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.eval_loader import center_crops
from data_pipelines.files import atomic_write, check_writable
from data_pipelines.images.decode import decode

if TYPE_CHECKING:
    from eval.target import Target

DEFAULT_COSINE = 0.9
_MAX_COMPONENTS = 128
_LEAST_VARIANCE = 1e-5  # of the largest
_SHOWN = 60  # pairs on the sheet
_ACROSS = 5


def clean(
    shards: str,
    val: str | None,
    *,
    by: str,
    encoder: str | None,
    threshold: float | None,
    mirrored: bool,
    out: Path,
    sheet: Path | None,
    device: str,
    threads: int | None,
    progress: bool,
) -> None:
    """Find the duplicates, write the list and the sheet, and print how many there are.

    Raises ValueError or OSError for places that cannot be written to before anything is read.
    """
    for place in (out, sheet):
        if place is not None:
            _check_place(place)
    datasets = open_splits(shards, val)
    find_near = _choose(datasets, by, encoder, threshold, mirrored, device, threads, progress)
    found = dedupe(datasets, find_near, threads=threads, progress=progress)
    found.write(out)
    console = Console(highlight=False, soft_wrap=True)
    if progress:
        console.print(summary_table(found))
    if found.num_unreadable:
        console.print(f"{found.num_unreadable:,} samples cannot be decoded; `selfsight verify` names them")
    console.print(
        f"wrote {out}: {len(found.duplicates):,} of {found.splits.num_samples:,} samples to leave out "
        f"(selfsight pack ... --leave-out {out})",
        markup=False,
    )
    if sheet is not None and not found.duplicates:
        console.print(f"no duplicates, so no {sheet}", markup=False)
    elif sheet is not None:
        with atomic_write(sheet) as file:
            duplicates_sheet(found).save(file, "PNG")
        console.print(f"wrote {sheet}: left out | stays", markup=False)


def _check_place(file: Path) -> None:
    if file.is_dir():
        raise ValueError(f"{file} is a folder; name a file in it by --out or --sheet")
    check_writable(file.parent)
    file.parent.mkdir(parents=True, exist_ok=True)


def open_splits(shards: str, val: str | None) -> dict[str, Dataset]:
    """The data sets to compare: of a folder its train, val and test; `val` names the val split elsewhere.

    Raises as `open_dataset` does.
    """
    datasets = {"train": open_dataset(shards, "train")}
    folder = Path(shards).expanduser()
    for split in HELD_OUT if folder.is_dir() else ():
        if any(folder.glob(f"{split}-*.tar")):
            datasets[split] = open_dataset(shards, split)
    if val is not None:
        datasets["val"] = open_dataset(val, "val")
    return datasets


def _choose(
    datasets: dict[str, Dataset],
    by: str,
    encoder: str | None,
    threshold: float | None,
    mirrored: bool,
    device: str,
    threads: int | None,
    progress: bool,
) -> FindNear:
    if by == "phash":
        if encoder is not None:
            raise ValueError("--encoder goes with --by features; perceptual hashes need none")
        if threshold is not None and threshold != int(threshold):
            raise ValueError(f"the threshold is {threshold:g}; of perceptual hashes it is a whole number of bits")
        return NearByHash(DEFAULT_RADIUS if threshold is None else int(threshold), mirrored, threads)
    if by != "features":
        raise ValueError(f"--by is {by!r}; it is phash or features")
    if encoder is None:
        raise ValueError("--by features needs --encoder: a run, an encoder folder or timm:NAME")
    if mirrored:
        raise ValueError("--mirrored goes with --by phash; an encoder decides itself what of mirror images it sees")
    least = DEFAULT_COSINE if threshold is None else threshold
    if not 0 < least <= 1:
        raise ValueError(f"the threshold is {least:g}; of features it is the least cosine of duplicates, 0 .. 1")
    return NearByFeatures(Splits(datasets), encoder, least, device, progress)


def whitened(features: torch.Tensor) -> torch.Tensor:
    """(n, k) principal components of (n, d) features, each of variance 1: the strongest 128 that are no rounding.

    Features of many encoders lie in a narrow cone, where all cosines are large; after whitening those of unrelated
    images lie around 0, whatever the encoder.
    """
    centred = (features - features.mean(dim=0)).double()
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(features))
    kept = torch.nonzero(variances > _LEAST_VARIANCE * variances[-1])[-_MAX_COMPONENTS:, 0]
    return (centred @ directions[:, kept] / variances[kept].sqrt()).float()


class NearByFeatures:
    """Pairs whose pooled features have, `whitened`, a cosine of at least `least`.

    The features are taken at once. Raises as `eval.target.open_target` does.
    """

    def __init__(self, splits: Splits, encoder: str, least: float, device: str, progress: bool) -> None:
        from eval.target import open_target

        self.least = least
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._features, self._numbers = self._extract(open_target(encoder), splits, progress)

    def __call__(self, prints: Fingerprints, rows: np.ndarray) -> Iterator[Pairs]:
        kept = np.flatnonzero(np.isin(self._numbers, rows))
        numbers = self._numbers[kept]
        for pairs in cosine_pairs(self._features[torch.from_numpy(kept)], self.least, device=self.device):
            yield Pairs(numbers[pairs.first], numbers[pairs.second], pairs.distance)

    @torch.no_grad()
    def _extract(self, target: Target, splits: Splits, progress: bool) -> tuple[torch.Tensor, np.ndarray]:
        """(n, k) features on the CPU and (n,) numbers of the samples that can be decoded."""
        encoder = target.encoder.eval().to(self.device)
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (target.mean, target.std))
        features, numbers = [], []
        columns = (TextColumn("features"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task("features", total=splits.num_samples)
            for dataset, part in splits.parts():
                for images, _, samples in center_crops(
                    dataset, target.image_size, channels=target.channels, bits=target.bits
                ):
                    pixels = images.to(self.device).float().div_(torch.iinfo(images.dtype).max)
                    features.append(encoder(pixels.sub_(mean).div_(std)).pooled.float().cpu())
                    numbers.append(samples.numpy() + part.start)
                    bar.advance(task, len(samples))
        return whitened(torch.cat(features)), np.concatenate(numbers)


def summary_table(found: Found) -> Table:
    """How many samples to leave out, by where they lie and by kind."""
    table = Table("to leave out", *KINDS, "of samples", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    sizes = dict(zip(found.splits.names, (d.num_samples for d in found.splits.datasets), strict=True))
    counts = found.counts()
    places = [f"within {name}" for name in sizes] + [where for where in sorted(counts) if "," in where]
    for where in places:
        name = where.removeprefix("within ").partition(",")[0]
        numbers = (f"{counts[where][kind]:,}" if where in counts else "0" for kind in KINDS)
        table.add_row(where, *numbers, f"{sizes[name]:,}")
    return table


def duplicates_sheet(found: Found, side: int = 128) -> Image.Image:
    """Pairs side by side, the most doubtful first: what would be left out, and what it is said to duplicate."""
    doubtful = sorted(found.duplicates, key=lambda duplicate: (-duplicate.distance, duplicate.number))[:_SHOWN]
    tiles = []
    for duplicate in doubtful:
        pair = Image.new("RGB", (2 * side + 2, side), "white")
        for place, number in enumerate((duplicate.number, duplicate.of)):
            pair.paste(_shown(found.splits, number, side), (place * (side + 2), 0))
        ours, theirs = (found.splits.describe(number) for number in (duplicate.number, duplicate.of))
        first = f"{ours['split']} {ours['key']}: {duplicate.kind} {duplicate.distance:.3g}"
        tiles.append(Tile(pair, (first, f"of {theirs['split']} {theirs['key']}")))
    rows = [tiles[first : first + _ACROSS] for first in range(0, len(tiles), _ACROSS)]
    return grid(rows, "left: would be left out; right: what it duplicates; the most different pairs first")


def _shown(splits: Splits, number: int, side: int) -> Image.Image:
    _, dataset, sample = splits.locate(number)
    image = decode(dataset.read(sample), channels=None, bits=None)
    return fitted(Display(image).rgb(image), side)
