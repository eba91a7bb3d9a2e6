"""`selfsight neighbours`: a page of images with those nearest to them, and of those that nothing is near to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from data_pipelines.packing.grouping import Grouping
from launch.data_commands import Progress

if TYPE_CHECKING:
    import numpy as np

    from data_pipelines.datasets.dataset import Dataset
    from eval.base import FeatureSet
    from eval.target import Target
    from launch.report.neighbours import Shown

NEIGHBOURS_EXAMPLES = (
    "Examples:\n\n[bold]selfsight neighbours runs/photos --data shards/[/]\n\n"
    "[bold]selfsight neighbours runs/photos --data shards/ --key ward-3/0412 --key ward-7/0001 --out page.html[/]"
)
#: By so many nearest others it is judged how typical an image is.
_TYPICAL_K = 10


class _Split(NamedTuple):
    name: str
    dataset: Dataset
    features: FeatureSet


def neighbours(
    target: Annotated[str, typer.Argument(help="A run, a checkpoint or an encoder folder, or timm:MODEL.")],
    data: Annotated[str, typer.Option(help="Shards, labelled or not; or images as `pack` takes: packed once.")],
    queries: Annotated[int, typer.Option(min=0, help="Images to ask about, drawn from val where there is one.")] = 12,
    key: Annotated[
        list[str] | None, typer.Option(help="An image to ask about, by its key in the data; may be repeated.")
    ] = None,
    nearest: Annotated[int, typer.Option(min=1, help="Neighbours of each, from train.")] = 8,
    least_typical: Annotated[int, typer.Option(min=0, help="Images far from all others.")] = 24,
    most: Annotated[int, typer.Option(min=2, help="Images of train to look among; of more, a draw.")] = 50_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The HTML file; default: neighbours.html of the run.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    image_size: Annotated[int | None, typer.Option(min=1, help="Side in px; default: the encoder's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 256,
    progress: Progress = True,
) -> None:
    """Write a page of images with those that the encoder finds most like them, and of the least typical ones."""
    from launch.probe_command import refuse_early

    data = refuse_early(target, data, Grouping(), ())
    import numpy as np

    from data_pipelines.files import write_text
    from eval.embed import open_all
    from eval.probe import device_named
    from eval.target import open_target
    from launch.report.neighbours import page, sheet

    device = device_named(device)
    opened = open_all(data, "all")
    subject = open_target(target, image_size)
    rng = np.random.default_rng(seed)
    pool_name, pool = opened[0]
    asked_of_name, asked_of = opened[-1]
    wanted = {name: _places(dataset, key or []) for name, dataset in opened}
    _check_keys(key or [], wanted, opened)
    drawn = np.sort(rng.permutation(pool.num_samples)[:most])
    among = _Split(pool_name, pool, _features(subject, pool, drawn, device, batch_size, progress))
    chosen: list[_Split] = []
    if key:
        chosen = [
            _Split(name, dataset, _features(subject, dataset, np.array(places), device, batch_size, progress))
            for name, dataset in opened if len(places := list(wanted[name].values()))
        ]  # fmt: skip
    elif queries:
        some = np.sort(rng.permutation(asked_of.num_samples)[:queries])
        features = _features(subject, asked_of, some, device, batch_size, progress)
        chosen = [_Split(asked_of_name, asked_of, features)]
    headline = subject.headline or among.features.pooled_as
    shown = [pair for split in chosen for pair in _answers(subject, split, among, headline, nearest, device)]
    untypical = _untypical(subject, among, headline, least_typical, device) if least_typical else []
    step = "" if subject.step is None else f", step {subject.step:,}"
    draw = f" (of {pool.num_samples:,}, drawn by seed {seed})" if len(drawn) < pool.num_samples else ""
    text = page(
        f"{subject.name}{step}: nearest images",
        [f"Queries on the left, then the nearest of {len(among.features.ids):,} images of {pool_name}{draw} with their "
         f"cosine similarity by the feature {headline}. Green: of the same class; orange: of another."],
        shown,
        untypical,
        [f"how typical an image is: its mean similarity to the {_TYPICAL_K} nearest others of {pool_name}"],
    )  # fmt: skip
    path = out or (Path(f"neighbours-{subject.name.replace(':', '-')}.html") if subject.run is None
                   else subject.run / "neighbours.html")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    if subject.run is not None and shown:  # where the report, and wandb, look for pictures
        pictures = subject.run / "pictures"
        pictures.mkdir(exist_ok=True)
        sheet(shown).save(pictures / f"neighbours-{subject.step or 0:08d}.png")
        from launch.report.page import refresh

        refresh(subject.run)
    typer.echo(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB); open it in any browser")


def _places(dataset: Dataset, keys: list[str]) -> dict[str, int]:
    """The numbers of the samples of these keys, of those that the data set has."""
    if not keys:
        return {}
    wanted, found = set(keys), {}
    for sample in range(dataset.num_samples):
        if (name := dataset.key(sample)[0]) in wanted:
            found[name] = sample
    return found


def _check_keys(keys: list[str], found: dict[str, dict[str, int]], opened: list[tuple[str, Dataset]]) -> None:
    lost = [key for key in keys if not any(key in places for places in found.values())]
    if lost:
        name, dataset = opened[0]
        raise ValueError(
            f"no image of {', '.join(split for split, _ in opened)} has the key {', '.join(lost)}; keys look like "
            f"{dataset.key(0)[0]} (the first of {name})"
        )


def _features(
    subject: Target, dataset: Dataset, samples: np.ndarray, device: str, batch_size: int, progress: bool
) -> FeatureSet:
    from eval.features import extract

    return extract(
        subject.encoder, dataset, size=subject.image_size, mean=subject.mean, std=subject.std,
        channels=subject.channels, bits=subject.bits, frames=subject.frames, frame_stride=subject.frame_stride,
        device=device, batch_size=batch_size, last_blocks=1,
        progress=progress, samples=samples,
    )  # fmt: skip


def _answers(
    subject: Target, asked: _Split, among: _Split, headline: str, k: int, device: str
) -> list[tuple[Shown, list[Shown]]]:
    import torch

    from eval.neighbours import nearest

    own = torch.full((len(asked.features.ids),), -1)
    if asked.name == among.name:  # an image is not its own neighbour
        place = {number: row for row, number in enumerate(among.features.ids.tolist())}
        own = torch.tensor([place.get(number, -1) for number in asked.features.ids.tolist()])
    near = nearest(among.features.inputs[headline], asked.features.inputs[headline], k, own, device)
    ids = among.features.ids
    return [
        (
            _shown(subject, asked.dataset, int(number)),
            [
                _shown(subject, among.dataset, int(ids[row]), float(similarity))
                for row, similarity in zip(rows, similarities, strict=True)
            ],
        )
        for number, rows, similarities in zip(asked.features.ids, near.rows, near.similarity, strict=True)
    ]


def _untypical(subject: Target, among: _Split, headline: str, count: int, device: str) -> list[Shown]:
    from eval.neighbours import least_typical

    rows, similarity = least_typical(among.features.inputs[headline], _TYPICAL_K, count, device)
    ids = among.features.ids
    return [
        _shown(subject, among.dataset, int(ids[row]), float(each)) for row, each in zip(rows, similarity, strict=True)
    ]


def _shown(subject: Target, dataset: Dataset, sample: int, number: float | None = None) -> Shown:
    """The crop that the encoder was given."""
    from einops import rearrange

    from data_pipelines.checks.contact_sheet import Display
    from data_pipelines.checks.show import class_name
    from data_pipelines.eval_loader import cropped
    from data_pipelines.images.decode import decode
    from data_pipelines.shards.index import NO_LABEL
    from launch.report.neighbours import Shown

    image = decode(dataset.read(sample), subject.channels, subject.bits)
    crop = rearrange(cropped(image, subject.image_size), "c h w -> h w c")
    label = "" if dataset.labels[sample] == NO_LABEL else class_name(dataset, sample)
    return Shown(Display(crop).rgb(crop), dataset.key(sample)[0], label, number)
