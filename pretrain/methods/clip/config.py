"""The section of image-text contrast, and what is known of the method (imports neither torch nor NumPy)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.registry import family_of
from pretrain.methods.mask_counts import mask_grid
from pretrain.methods.masks import MaskConfig, check_mask
from pretrain.methods.spec import MethodSpec, Metric, Needs, Tokens
from pretrain.text.settings import TextConfig

if TYPE_CHECKING:
    from data_pipelines.rng import DrawFields
    from pretrain.config import Config


@section
class ClipConfig:
    """Images and their captions drawn together, and apart from all others of a step: CLIP (Radford et al. 2021), SigLIP
    (Zhai et al. 2023), and with a mask FLIP (Li et al. 2023)."""

    name: Literal["clip"] = "clip"
    text: str = "txt"
    """Where captions are: `txt`, each line of a sample's .txt; `json:FIELD`, a string or a list of its .json. Of
    several one is drawn."""
    loss: Literal["infonce", "siglip"] = "infonce"
    """`infonce`: the right caption among all of the global batch. `siglip`: each pair by itself."""
    tower: TextConfig = TextConfig()  # what encodes captions
    embed_dim: PositiveInt = 512  # width of what images and captions are compared in
    mask: MaskConfig | None = None  # units of an image that are left out (FLIP); null: none

    @model_validator(mode="after")
    def _check(self) -> ClipConfig:
        if self.text != "txt" and not (self.text.startswith("json:") and self.text.removeprefix("json:").strip()):
            raise ValueError(f"text is {self.text!r}; it must be txt or json:FIELD, such as json:caption")
        if self.mask is not None and self.mask.kind == "blockwise":
            raise ValueError("equally many units are left out of every image; blockwise masks vary: use kind random")
        if self.mask is not None and self.mask.secondary:
            raise ValueError("nothing is put in the place of what is left out: set mask.secondary=0")
        return self


def _check(config: Config, tokens: Tokens | None) -> None:
    method, encoder = config.method, config.encoder
    if config.train.batch_size < 2:
        raise ValueError("train.batch_size is 1; an image is told by its caption from others of its step: take many")
    if config.data.adopt is not None:
        raise ValueError("captions are looked up among the samples there are at the start: set data.adopt=null")
    if method.mask is None:
        return
    check_mask(method.mask, config.views.global_size, tokens)
    if tokens is not None and family_of(encoder).drop_layout == "one_in_2x2" and method.mask.kind != "one_in_2x2":
        raise ValueError(
            f"masks on {encoder.family} need method.mask.kind=one_in_2x2, not {method.mask.kind}: the visible units "
            "must form a dense map"
        )


def _draw(section: ClipConfig, image_size: tuple[int, int], stride: int | None, batch_size: int) -> DrawFields | None:
    from pretrain.stream.masking import draw_units, mask_stream

    mask = section.mask
    if mask is None:
        return None
    grid = mask_grid(mask, image_size)
    return lambda *place: {"drop_mask": draw_units(mask_stream(*place), mask, grid)}


SPEC = MethodSpec(
    name="clip",
    title="CLIP",
    config=ClipConfig,
    build="pretrain.methods.clip.method:build",
    example={
        "tower": {"dim": 32, "depth": 1, "heads": 2, "context": 12, "vocab_size": 320},
        "embed_dim": 16,
    },
    headline="pooled",
    needs=lambda section: Needs(
        drops_units=None
        if section.mask is None
        else "Set method.mask=null, or take an encoder that leaves units out: `selfsight encoders`, under mae"
    ),
    check=_check,
    draw=_draw,
    sources="pretrain.methods.clip.captions:check_captions",
    alarms="pretrain.methods.clip.alarms:alarms",
    metrics={
        "matched": Metric("images nearest to their own caption, of the global batch", percent=True),
        "logit_scale": Metric("what cosines are multiplied by (1 / temperature)", "Diagnostics"),
    },
    shown="text",
)
