"""An encoder as a multi-scale backbone: images to maps of strides 4, 8, 16 and 32, all of one width."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
from einops import rearrange
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from pretrain.encoders.base import Encoder, Windows
from pretrain.encoders.registry import build_encoder
from pretrain.encoders.saved import EncoderCard
from pretrain.encoders.transfer import fit
from pretrain.interop.features.necks import SUBSAMPLED_AFTER, SimplePyramid, StagePyramid
from pretrain.interop.features.settings import FeatureSettings, evenly_spaced

USUAL_WINDOW = 14  # tokens (ViTDet)
USUAL_LEVELS = (2, 3, 4, 5)


class Backbone(nn.Module):
    """Images (b, c, h, w), normalised by `mean` and `std`, to {"p2": (b, width, h / 4, w / 4), "p3": ...}.

    h and w are multiples of `size_divisible`. What plays no part in the maps, such as a class token that is left out,
    is frozen, so that every parameter that learns has a gradient.

    encoder: what was pretrained, perhaps within a form with windows. plain: the encoder itself.
    strides: of the maps in px, by name. own_strides, own_widths: likewise of the encoder's own maps (`maps`).
    out_channels: of every map, where torchvision looks for it.
    """

    def __init__(self, encoder: Encoder, card: EncoderCard, settings: FeatureSettings) -> None:
        super().__init__()
        self.card, self.settings = card, settings
        self.mean, self.std = tuple(card.mean), tuple(card.std)
        self.plain_stride = encoder.stride
        self.ends = encoder.stage_ends()
        self.own_strides, self.own_widths = _own_maps(encoder, card)
        own = {int(name[1:]): width for name, width in self.own_widths.items()}
        levels = settings.levels or _usual_levels(own)
        _check_levels(levels, own, encoder)
        windows = _windows(encoder, settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.encoder = encoder if windows is None else encoder.windowed(windows)
            self.norms = nn.ModuleDict(
                {f"c{level}": LayerNorm2d(width) for level, width in own.items() if level != max(own)}
            )
            if len(own) == 1:
                ((level, width),) = own.items()
                self.neck: nn.Module = SimplePyramid(width, level, levels, settings.width)
            else:
                self.neck = StagePyramid(own, levels, settings.width)
        self.strides = {f"p{level}": 2**level for level in levels}
        self.out_channels = settings.width
        pooled = [level for level in levels if level <= max(SUBSAMPLED_AFTER, levels[0])] if len(own) == 1 else []
        self.size_divisible = math.lcm(encoder.stride, *(2**level for level in pooled))
        freeze_what_is_not_read(self, lambda image: self(image).values(), self.small_image())

    @property
    def plain(self) -> Encoder:
        """The encoder without windows; it shares its weights with this backbone."""
        return self.encoder if isinstance(self.encoder, Encoder) else self.encoder.encoder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.neck(self.maps(images))

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """The encoder's own maps, such as {"c4": (b, d, h / 16, w / 16)}: of each stage; the last through its norm."""
        self.check_size(images)
        if len(self.ends) == 1:
            found = [self.encoder(images)]
        else:
            last = self.encoder(images, layers=self.ends[:-1])
            found = [*last.layers, last]
        maps = {}
        for name, features in zip(self.own_strides, found, strict=True):
            cells = rearrange(features.tokens, "b (h w) d -> b d h w", h=features.grid[0])
            maps[name] = self.norms[name](cells) if name in self.norms else cells
        return maps

    def small_image(self) -> Tensor:
        """Zeros (1, c, h, w) that every map can be made of."""
        side = math.lcm(self.size_divisible, *self.strides.values())
        return torch.zeros(1, self.card.channels, side, side)

    def check_size(self, images: Tensor) -> None:
        """Raise ValueError for images that are no multiple of `size_divisible`, or of other channels."""
        channels, height, width = images.shape[-3:]
        side = self.size_divisible
        if channels != self.card.channels:
            raise ValueError(f"images of {channels} channels, and the backbone takes {self.card.channels}")
        if height % side or width % side or not height or not width:
            up = tuple(max(1, -(-given // side)) * side for given in (height, width))
            raise ValueError(
                f"images are {height}x{width} px, and this backbone takes multiples of {side} px; fill them up with "
                f"zeros to {up[0]}x{up[1]}, right and below (torchvision's detectors do, with size_divisible={side})"
            )


def prepared(encoder: Encoder, card: EncoderCard, settings: FeatureSettings) -> tuple[Encoder, EncoderCard]:
    """The encoder with the drop path and the patch that `settings` ask for, the same number of patches in its images.

    Raises ValueError for a patch that its embedding can't be resampled to.
    """
    config, patch = card.encoder, settings.patch or encoder.patch
    if settings.drop_path is not None and settings.drop_path != config.drop_path:
        config = dataclasses.replace(config, drop_path=settings.drop_path)
    if patch != encoder.patch:
        if len(encoder.stage_ends()) > 1 or not hasattr(config, "patch"):
            raise ValueError(
                f"patch={patch} is for plain encoders of our own; that of a pyramid follows from its stages"
            )
        config = dataclasses.replace(config, patch=patch)
    if config == card.encoder:
        return encoder, card
    size = tuple(side // encoder.patch * patch for side in card.image_size)
    card = dataclasses.replace(card, encoder=config, image_size=size)
    changed = build_encoder(config, size, card.channels)
    fitted = fit(encoder.inner().state_dict(), changed, old_grid=tuple(side // patch for side in size))
    if fitted.left or fitted.fresh:
        raise ValueError(f"patch={patch} does not fit this encoder: {'; '.join(fitted.lines())}")
    changed.inner().load_state_dict(fitted.weights)
    return changed.eval(), card


def _own_maps(encoder: Encoder, card: EncoderCard) -> tuple[dict[str, int], dict[str, int]]:
    """Strides and widths of the encoder's own maps; ValueError for one that has none of a stride 2, 4, 8, ..."""
    family = card.encoder.family
    if encoder.stride > encoder.patch and len(encoder.stage_ends()) == 1:
        raise ValueError(
            f"{family} gives its last map alone, of stride {encoder.stride}; of timm's own pyramids take "
            "timm.create_model(NAME, features_only=True)"
        )
    ends = encoder.stage_ends()
    shown = torch.zeros(1, card.channels, *card.image_size)
    with torch.no_grad():
        last = encoder(shown, layers=ends[:-1]) if len(ends) > 1 else encoder(shown)
    strides, widths = {}, {}
    for features in (*last.layers, last):
        if features.grid is None:
            raise ValueError(
                f"an encoder of the family {family} whose tokens are no map has no features of several scales"
            )
        stride = card.image_size[0] // features.grid[0]
        if stride & (stride - 1):
            near = 2 ** round(math.log2(stride))
            raise ValueError(
                f"its map has stride {stride}, and those of detectors are powers of 2; patch={near} resamples the "
                f"patch embedding to {near} px"
            )
        name = f"c{stride.bit_length() - 1}"
        strides[name], widths[name] = stride, features.tokens.shape[-1]
    return strides, widths


def _usual_levels(own: dict[int, int]) -> tuple[int, ...]:
    if len(own) == 1:
        return USUAL_LEVELS
    return tuple(level for level in own if level in USUAL_LEVELS) or tuple(own)


def _check_levels(levels: tuple[int, ...], own: dict[int, int], encoder: Encoder) -> None:
    if len(own) > 1 and (levels[0] < min(own) or levels[0] > max(own)):
        has = ",".join(map(str, own))
        raise ValueError(
            f"levels start with {levels[0]}, and this pyramid's own maps are of level {has} (strides "
            f"{', '.join(str(2**level) for level in own)}); start with one of them, such as levels=[{has}]"
        )


def _windows(encoder: Encoder, settings: FeatureSettings) -> Windows | None:
    """What the encoder's blocks are asked for; None: nothing but what they are."""
    side = settings.window
    if side is None:
        side = USUAL_WINDOW if encoder.takes_windows else 0
    relative = settings.relative_positions if settings.relative_positions is not None else side > 0
    if side == 0 and not relative and settings.class_token:
        return None
    if not encoder.takes_windows:
        asked = [
            text
            for text, wanted in (
                (f"window={side}", side > 0),
                ("relative_positions=true", relative),
                ("class_token=false", not settings.class_token),
            )
            if wanted
        ]
        raise ValueError(
            f"{', '.join(asked)} can't be had of {type(encoder).__name__}, whose blocks attend as they were trained "
            "to; leave it out"
        )
    blocks = settings.global_blocks
    everywhere = blocks if isinstance(blocks, tuple) else evenly_spaced(blocks, encoder.depth) if blocks else ()
    grid = None
    if settings.image_size is not None:
        if any(given % encoder.patch for given in settings.image_size):
            raise ValueError(
                f"image_size is {settings.image_size}; it must be multiples of the patch of {encoder.patch} px"
            )
        grid = (settings.image_size[0] // encoder.patch, settings.image_size[1] // encoder.patch)
    return Windows(side, everywhere, relative, grid, settings.filler == "seen", settings.class_token)


def freeze_what_is_not_read(backbone: nn.Module, read: Callable[[Tensor], Iterable[Tensor]], image: Tensor) -> None:
    """Take the gradient from parameters that nothing of what is `read` of an image depends on: DDP and others wait for
    the gradient of each that learns."""
    training = backbone.training
    backbone.eval()
    with torch.enable_grad():
        todo = [value.grad_fn for value in read(image)]
        seen, found = set(), set()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                found.add(id(node.variable))
            todo += [following for following, _ in node.next_functions]
    for parameter in backbone.parameters():
        if id(parameter) not in found:
            parameter.requires_grad_(False)
    backbone.train(training)
