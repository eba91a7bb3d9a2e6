"""What a data set looks like: a sheet of its images, and its sizes, shapes, file sizes and classes in one figure."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipelines.checks.contact_sheet import Display, Tile, fitted, grid
from data_pipelines.checks.map_pictures import with_maps
from data_pipelines.cores import cores_per_process
from data_pipelines.datasets.dataset import NO_LABEL, Dataset
from data_pipelines.images.decode import DAMAGE, BadSampleError, decode, look
from data_pipelines.images.issues import shown
from data_pipelines.images.sample import Sample
from data_pipelines.images.stacks import decode_stack
from data_pipelines.transforms.frames import Frames
from data_pipelines.wording import samples_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MAX_HEADERS = 50_000  # images whose headers are read; of more, so many are drawn
_PIECE = 256  # headers a thread reads at a time
_ACROSS = 8  # samples in a row of the sheet
_SIDE = 160  # px of a sample's longer side
_FRAMES = 4  # of a stack, where nothing else is said
_FEW_SIZES = 200  # are drawn one by one


def balanced(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of `count` samples (or all, if they are fewer), drawn from every class in turn, ordered by class.

    Samples without a label are a class of their own.
    """
    turns = np.empty(len(labels), dtype=np.int64)  # the how-manieth of its class a sample is, in a random order
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    turns[by_class] = np.arange(len(labels)) - np.repeat(first, sizes)
    chosen = np.lexsort((rng.random(len(labels)), turns))[:count]
    return chosen[np.lexsort((chosen, labels[chosen]))]


def samples_sheet(
    dataset: Dataset, count: int, seed: int, bands: tuple[int, ...] = (0, 1, 2), frames: int = 1
) -> Image.Image:
    """`count` images with their keys, classes and sizes; in a data set with labels, as many of each class. Masks lie
    over their images in colours, a colour a class; depths stand beside them, what is far bright. A stack is shown as a
    strip of `frames`, or of four where that is 1 and its members tell that it is one."""
    tiles = []
    for number in balanced(dataset.labels, count, np.random.default_rng(seed)).tolist():
        key, _ = dataset.key(number)
        stored = dataset.read(number)
        try:
            if stored.frames or frames > 1:
                tiles.append(_strip(dataset, number, stored, bands, frames if frames > 1 else _FRAMES))
                continue
            image = decode(stored, channels=None, bits=None)
        except BadSampleError as error:
            tiles.append(Tile(Image.new("RGB", (_SIDE, _SIDE), "lightgrey"), (key, error.reason)))
            continue
        size = f"{image.shape[1]}x{image.shape[0]}"
        picture, told = with_maps(dataset, number, Display(image, bands).rgb(image))
        caption = key, f"{class_name(dataset, number)} {size}".strip(), *told
        tiles.append(Tile(fitted(picture, _SIDE), caption))
    across = max(1, _ACROSS * _SIDE // max(_SIDE, *(tile.image.width for tile in tiles)))
    rows = [tiles[first : first + across] for first in range(0, len(tiles), across)]
    return grid(rows, f"{len(tiles)} of {dataset.num_samples:,} samples")


def _strip(dataset: Dataset, number: int, stored: Sample, bands: tuple[int, ...], frames: int) -> Tile:
    pictures = decode_stack(stored, Frames(frames).chosen, channels=None, bits=None)
    shown = np.concatenate([picture.pixels for picture in pictures], axis=1)
    height, width, _ = pictures[0].pixels.shape
    of = f" x {len(stored.frames)}" if stored.frames else ""
    caption = stored.key, f"{class_name(dataset, number)} {width}x{height}{of}".strip()
    return Tile(fitted(Display(shown, bands).rgb(shown), _SIDE * min(frames, _FRAMES)), caption)


def class_name(dataset: Dataset, sample: int) -> str:
    """The name of a sample's class, or its number; empty where it has no label."""
    label = int(dataset.labels[sample])
    if label == NO_LABEL:
        return ""
    return shown(dataset.classes[label]) if dataset.classes and label < len(dataset.classes) else f"class {label}"


@dataclass(frozen=True)
class Statistics:
    """Of a data set, as far as headers and the index tell.

    widths, heights: px of the images whose headers were read, as stored.
    num_bytes: of those images' files. num_unreadable: headers that could not be read.
    class_counts: by label, of all samples; `NO_LABEL` for those without.
    """

    num_samples: int
    num_shards: int
    widths: np.ndarray
    heights: np.ndarray
    num_bytes: np.ndarray
    num_unreadable: int
    class_counts: Counter[int]
    classes: tuple[str, ...] | None


def measure(dataset: Dataset, seed: int = 0, threads: int | None = None, progress: bool = True) -> Statistics:
    """Read the headers of all images, or of 50,000 drawn by `seed`."""
    numbers = np.arange(dataset.num_samples)
    if len(numbers) > MAX_HEADERS:
        numbers = np.sort(np.random.default_rng(seed).choice(len(numbers), MAX_HEADERS, replace=False))
    pieces = [numbers[first : first + _PIECE] for first in range(0, len(numbers), _PIECE)]
    rows: list[tuple[int, int, int]] = []
    columns = (TextColumn("looking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar, ThreadPoolExecutor(threads or cores_per_process()) as pool:
        task = bar.add_task("looking", total=len(numbers))
        for found, piece in zip(pool.map(lambda piece: _headers(dataset, piece), pieces), pieces, strict=True):
            rows.extend(found)
            bar.advance(task, len(piece))
    widths, heights, num_bytes = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    labels, counts = np.unique(dataset.labels, return_counts=True)
    return Statistics(
        num_samples=dataset.num_samples,
        num_shards=len(dataset.shards),
        widths=widths,
        heights=heights,
        num_bytes=num_bytes,
        num_unreadable=len(numbers) - len(rows),
        class_counts=Counter(dict(zip(labels.tolist(), counts.tolist(), strict=True))),
        classes=dataset.classes,
    )


def _headers(dataset: Dataset, numbers: np.ndarray) -> list[tuple[int, int, int]]:
    """Width, height and bytes of each image whose header can be read."""
    found = []
    for number in numbers.tolist():
        content = dataset.read(number).image
        try:
            header = look(content)
        except DAMAGE:
            continue
        found.append((header.width, header.height, len(content)))
    return found


def summary(statistics: Statistics) -> str:
    """The statistics in a few lines."""

    def spread(values: np.ndarray) -> str:
        low, middle, high = (_number(value) for value in (values.min(), np.median(values), values.max()))
        return f"{low} to {high}, the median {middle}" if low != high else f"{low} (all)"

    read = len(statistics.widths) + statistics.num_unreadable
    lines = [f"{samples_in(statistics.num_samples, statistics.num_shards)}; {read:,} headers read"]
    if len(statistics.widths):
        lines += [
            f"width: {spread(statistics.widths)} px",
            f"height: {spread(statistics.heights)} px",
            f"width / height: {spread(statistics.widths / statistics.heights)}",
            f"bytes: {spread(statistics.num_bytes)}",
        ]
    labelled = {label: count for label, count in statistics.class_counts.items() if label != NO_LABEL}
    if labelled:
        few, many = min(labelled, key=lambda k: labelled[k]), max(labelled, key=lambda k: labelled[k])
        lines.append(
            f"classes: {len(labelled):,}, from {labelled[few]:,} ({_class(statistics, few)}) to {labelled[many]:,} "
            f"({_class(statistics, many)}) samples"
        )
    if statistics.class_counts[NO_LABEL]:
        lines.append(f"without a label: {statistics.class_counts[NO_LABEL]:,}")
    if statistics.num_unreadable:
        lines.append(f"unreadable: {statistics.num_unreadable:,}; `selfsight verify` names them")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _class(statistics: Statistics, label: int) -> str:
    classes = statistics.classes
    return shown(classes[label]) if classes and label < len(classes) else f"class {label}"


def statistics_figure(statistics: Statistics) -> Figure:
    """Sizes, shapes, bytes and classes side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    (sizes, shapes), (weights, classes) = figure.subplots(2, 2)
    _draw_sizes(sizes, statistics)
    _draw_histogram(shapes, statistics.widths / statistics.heights, "width / height", "shape")
    _draw_histogram(weights, statistics.num_bytes, "bytes", "files")
    _draw_classes(classes, statistics)
    unreadable = f", {statistics.num_unreadable:,} unreadable" if statistics.num_unreadable else ""
    figure.suptitle(f"{samples_in(statistics.num_samples, statistics.num_shards)}{unreadable}")
    return figure


def _draw_sizes(axes: Axes, statistics: Statistics) -> None:
    axes.set(xlabel="width (px)", ylabel="height (px)")
    sizes, counts = np.unique(np.stack([statistics.widths, statistics.heights]), axis=1, return_counts=True)
    if not counts.size:
        return
    if counts.size <= _FEW_SIZES:
        areas = 15 + 385 * counts / counts.max()
        axes.scatter(sizes[0], sizes[1], s=areas, alpha=0.5, edgecolors="none")
    else:
        image = axes.hist2d(statistics.widths, statistics.heights, bins=80, norm="log", cmap="viridis")[3]
        bar = axes.figure.colorbar(image, ax=axes, label="images")
        _plain_numbers(bar.ax.yaxis, 1, float(image.get_clim()[1] or 1))
    axes.margins(0.15)
    axes.set_xlim(left=max(0, axes.get_xlim()[0]))
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    common = np.argsort(-counts, kind="stable")[:3]
    named = ", ".join(f"{sizes[0, place]}x{sizes[1, place]} ({counts[place]:,})" for place in common)
    axes.set_title(f"size, most often {named}" if counts.size > 1 else f"size, all {named}")


def _draw_histogram(axes: Axes, values: np.ndarray, name: str, title: str) -> None:
    """On a logarithmic axis where the values span more than a factor of ten."""
    axes.set(title=title, xlabel=name, ylabel="images")
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())
    if low == high:
        axes.bar([_number(low)], [values.size], width=0.3)
        axes.set_xlim(-1, 1)
    elif low > 0 and high / low > 10:
        axes.hist(values, bins=np.geomspace(low, high, 60).tolist())
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis, low, high)
    else:
        axes.hist(values, bins=60)


def _plain_numbers(axis: Axis, low: float, high: float) -> None:
    """Numbers in full on a logarithmic axis, as many of every power of ten as have room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    subs = (1, 2, 5) if high / low < 100 else (1, 3) if high / low < 1e4 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_classes(axes: Axes, statistics: Statistics) -> None:
    """The classes from the largest to the smallest; named where there is room for the names."""
    counts = sorted(
        ((count, label) for label, count in statistics.class_counts.items() if label != NO_LABEL),
        key=lambda entry: (-entry[0], entry[1]),
    )
    axes.set(title=f"classes ({len(counts):,})")
    if not counts:
        axes.text(0.5, 0.5, "no labels", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    sizes = [count for count, _ in counts]
    if len(counts) <= 30:
        axes.barh([_class(statistics, label)[-24:] for _, label in counts], sizes)
        axes.invert_yaxis()
        axes.set_xlabel("samples")
        axes.bar_label(axes.containers[0], fmt="{:,.0f}", padding=3)  # type: ignore[arg-type]
        axes.margins(x=0.15)
    else:
        axes.fill_between(range(len(sizes)), sizes, step="mid", alpha=0.8)
        axes.set(xlabel="classes, the largest first", ylabel="samples", xlim=(0, len(sizes) - 1))
        axes.set_ylim(bottom=0)
        if sizes[0] > 10 * sizes[-1]:
            axes.set_yscale("log")
            axes.set_ylim(bottom=max(0.5, sizes[-1] / 2))
