"""What a preset makes of images, for the eye: where its crops lie, what they look like, what is hidden of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from data_pipelines.balance import BalancedRows
from data_pipelines.checks.contact_sheet import Display, Tile, fitted, grid
from data_pipelines.datasets.dataset import Dataset
from data_pipelines.images.decode import decode
from data_pipelines.images.stacks import decode_stack
from data_pipelines.loader import Batch, Loader
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.backends.any_channels import fitting
from data_pipelines.transforms.backends.device import finish
from data_pipelines.transforms.frames import Frames
from data_pipelines.transforms.params import CropParams, draw
from pretrain.config import Config
from pretrain.methods.registry import draw_fields_for
from pretrain.stream.datasets import sampler_of
from pretrain.stream.native_batch import canvases, grids_of

_SIDE = 144  # px of a crop's longer side
_FRAME = 3
_ACROSS = 11
_GLOBAL, _LOCAL, _TARGET = ("#d62728", "#ff7f0e"), "#1f77b4", "#2ca02c"
#: Colours that units are covered with, and how much of them.
_DROPPED, _REPLACED = ((60, 60, 60), 0.8), ((30, 110, 220), 0.65)
_SHORT = {"brightness": "b", "contrast": "c", "saturation": "s", "hue": "h"}


def crop_sheet(
    config: Config, datasets: Sequence[Dataset], count: int, step: int = 0, bands: tuple[int, ...] = (0, 1, 2)
) -> Image.Image:
    """The first `count` rows of a step's batch, or a few more where the batch does not divide: each image with the
    boxes of its crops, then every crop with what was drawn for it, the units covered that are dropped (grey) or
    replaced (blue).

    The crops are the loader's: what a run is shown at that step, but for the colours that are left to a GPU.
    """
    sampler = sampler_of(config, datasets)
    num_rows = next(
        n for n in range(min(count, sampler.batch_size), sampler.batch_size + 1) if not sampler.batch_size % n
    )
    with Loader(
        sampler,
        config.views,
        world_size=sampler.batch_size // num_rows,  # rank 0 of so many: the first rows
        draw=draw_fields_for(config),
        prefetch=0,
        max_bad_share=1.0,
        channels=config.data.channels,
        bits=config.data.bits,
        frames=config.data.frames,
        frame_stride=config.data.frame_stride,
        backend=config.data.backend,
    ) as loader:
        (batch,) = next(loader.steps(step))
        if "global_colours" in batch:
            batch = finish(batch, batch)
        if config.views.native:
            batch = of_own_shape(batch, config)
        arrays = {name: part.numpy() for name, part in batch.items() if isinstance(part, Tensor)}
    shown = [_row(config, sampler, step, row, arrays, bands) for row in range(num_rows)]
    beside = max(1, _ACROSS // len(shown[0]))  # images in a row, where they have few crops
    rows = [list(chain(*shown[first : first + beside])) for first in range(0, len(shown), beside)]
    return grid(rows, _title(config, step))


def _title(config: Config, step: int) -> str:
    key = "b brightness, c contrast, s saturation, h hue, in the order they were drawn"
    return f"{config.name}, step {step} | {key} | units covered grey are dropped, blue replaced"


def _row(
    config: Config, sampler: Sampler, step: int, row: int, arrays: dict[str, np.ndarray], bands: tuple[int, ...]
) -> list[Tile]:
    views, _ = fitting(config.views, config.data.channels)
    asked = BalancedRows(sampler, config.views).rows(step, range(row, row + 1))[0]
    number, sample = arrays["ids"][row].tolist()
    data, stored = config.data, sampler.datasets[number].read(sample)
    if data.frames == 1:
        images = [decode(stored, data.channels, bits=data.bits)]
    else:
        showing = (sampler.seed, asked.dataset, asked.epoch, asked.sample)
        wanted = partial(Frames(data.frames, data.frame_stride).drawn, showing)
        images = [picture.pixels for picture in decode_stack(stored, wanted, data.channels, bits=data.bits)]
    image = images[0]
    display = Display(image, bands)
    drawn = draw(views, asked.identity(sampler.seed), image.shape[:2])
    num_global = len(views.global_crops)
    colours = [_GLOBAL[view % len(_GLOBAL)] for view in range(num_global)] + [_LOCAL] * (len(drawn) - num_global)
    key, _ = sampler.datasets[number].key(sample)
    boxed = _side_by_side([_with_boxes(display.rgb(frame), drawn, colours) for frame in images])
    tiles = [Tile(boxed, (key, f"{image.shape[1]}x{image.shape[0]}" + _times(images)))]

    def rgb(crop: np.ndarray) -> Image.Image:
        return display.rgb(rearrange(crop, "(t c) h w -> h (t w) c", t=len(images)))

    for view in range(num_global):
        crop = rgb(_shown(arrays, "global", row, view))
        for name, cover in (("drop_mask", _DROPPED), ("token_mask", _REPLACED)):
            if name in arrays:
                mask = arrays[name][row]
                mask = mask if mask.ndim == 2 else mask[view]
                if "global_grids" in arrays:
                    rows, columns = arrays["global_grids"][row, view]
                    mask = mask[:rows, :columns]
                crop = _covered(crop, np.tile(mask, (1, len(images))), *cover)
        tiles.append(_tile(crop, f"global {view + 1}", drawn[view], colours[view], len(images)))
    for view in range(num_global, len(drawn)):
        crop = rgb(_shown(arrays, "local", row, view - num_global))
        tiles.append(_tile(crop, f"local {view - num_global + 1}", drawn[view], colours[view], len(images)))
    if "target_crops" in arrays:
        crop = rgb(arrays["target_crops"][row])
        tiles.append(_tile(crop, "target", drawn[0], _TARGET))
    if "teacher_crops" in arrays:
        tiles += [
            _tile(rgb(crop), f"teacher's {view + 1}", drawn[view], _TARGET, len(images))
            for view, crop in enumerate(arrays["teacher_crops"][row])
        ]
    return tiles


def _shown(arrays: dict[str, np.ndarray], kind: str, row: int, view: int) -> np.ndarray:
    """A crop (c, h, w); of its canvas no more than is its own, where it keeps its own shape."""
    crop = arrays[f"{kind}_crops"][row, view]
    if f"{kind}_grids" not in arrays:
        return crop
    height, width = arrays[f"{kind}_grids"][row, view] * arrays["patch"]
    return crop[:, :height, :width]


def of_own_shape(batch: Batch, config: Config) -> Batch:
    """A batch of crops of their own shape on canvases, with the grid (b, v, 2) of each, and what is drawn of patches as
    maps (b, v, h, w), empty beyond the image."""
    patch, rows = config.views.global_crops[0].patch, len(batch["rows"])
    assert patch is not None
    made = {"ids": batch["ids"], "rows": batch["rows"], "patch": torch.tensor(patch)}
    made |= canvases(batch, config.data.channels, patch)
    for kind in ("global", "local"):
        if f"{kind}_lengths" in batch:
            made[f"{kind}_grids"] = rearrange(torch.tensor(grids_of(batch, kind)), "(v b) two -> b v two", b=rows)
    for name in ("drop_mask", "token_mask"):
        if name in batch:
            side = made["global_crops"].shape[-1] // patch
            maps = torch.zeros(len(batch["global_lengths"]), side, side, dtype=torch.bool)
            image = torch.repeat_interleave(batch["global_lengths"])
            maps[image, batch["global_positions"][:, 0], batch["global_positions"][:, 1]] = batch[name]
            made[name] = rearrange(maps, "(v b) h w -> b v h w", b=rows)
    return made


def _with_boxes(image: Image.Image, drawn: Sequence[CropParams], colours: Sequence[str]) -> Image.Image:
    shown = fitted(image, 2 * _SIDE)
    scale = shown.width / image.width, shown.height / image.height
    pen = ImageDraw.Draw(shown)
    for params, colour in reversed(list(zip(drawn, colours, strict=True))):  # the global ones on top
        left, top, right, bottom = (side * scale[place % 2] for place, side in enumerate(params.box))
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=2)
    return shown


def _side_by_side(frames: Sequence[Image.Image]) -> Image.Image:
    """The frames of a stack as a strip; a single image as it is."""
    if len(frames) == 1:
        return frames[0]
    shown = [fitted(frame, _SIDE) for frame in frames]
    strip = Image.new("RGB", (sum(frame.width for frame in shown), shown[0].height))
    for number, frame in enumerate(shown):
        strip.paste(frame, (number * shown[0].width, 0))
    return strip


def _times(frames: Sequence[object]) -> str:
    return f" x {len(frames)}" if len(frames) > 1 else ""


def _tile(crop: Image.Image, name: str, params: CropParams, colour: str, frames: int = 1) -> Tile:
    shown = fitted(crop, _SIDE * frames)
    framed = Image.new("RGB", (shown.width + 2 * _FRAME, shown.height + 2 * _FRAME), colour)
    framed.paste(shown, (_FRAME, _FRAME))
    return Tile(
        framed,
        (
            f"{name} {crop.width // frames}x{crop.height}{_times(range(frames))}",
            *(line for line in told(params) if line),
        ),
    )


def told(params: CropParams) -> tuple[str, str]:
    """What was drawn for a crop beside its box: colour jitter, then the rest."""
    jitter = " ".join(f"{_SHORT[name]}{factor:.2f}" for name, factor in params.jitter)
    rest = [name for name in ("flip", "grayscale", "solarise") if getattr(params, name)]
    if params.blur_radius is not None:
        rest.insert(-1 if params.solarise else len(rest), f"blur {params.blur_radius:.1f}")
    return jitter, " ".join(rest)


def _covered(image: Image.Image, mask: np.ndarray, colour: tuple[int, int, int], strength: float) -> Image.Image:
    """The image with the units of `mask` (gh, gw) covered."""
    cover = Image.fromarray((mask * round(255 * strength)).astype(np.uint8)).resize(
        image.size, Image.Resampling.NEAREST
    )
    return Image.composite(Image.new("RGB", image.size, colour), image, cover)
