"""I-JEPA's section, and what is known of the method (imports neither torch nor NumPy)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import Share, section
from pretrain.methods.spec import MethodSpec, Metric, Needs, Tokens

if TYPE_CHECKING:
    from data_pipelines.rng import DrawFields
    from pretrain.config import Config

Part = Annotated[float, Field(gt=0, le=1)]


@section
class IjepaConfig:
    """Features of blocks of an image predicted from those of another part (Assran et al. 2023)."""

    name: Literal["ijepa"] = "ijepa"
    targets: PositiveInt = 4  # blocks whose features are predicted, each by itself
    target_scale: tuple[Part, Part] = (0.15, 0.2)  # share of the image that a block has, one for all of a step
    target_aspect: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.5)  # its height over its width
    context_scale: tuple[Part, Part] = (0.85, 1.0)  # of the square block that is seen, less the targets
    min_context: PositiveInt = 11  # fewest units that are seen
    sampling: Literal["fair", "as_published"] = "fair"
    """`fair`: blocks reach every unit, size and shape are drawn apart, and what one image sees more than another of the
    step is left out at random. `as_published`: blocks never reach the last row and column, one number sets a target's
    size and shape, and of each image the first units in raster order are kept."""
    unit: PositiveInt | None = None  # px; default: the encoder's stride
    predictor_dim: PositiveInt = 384  # width
    predictor_depth: PositiveInt = 6  # blocks
    predictor_heads: PositiveInt = 12  # attention heads
    teacher_momentum: Share = 0.996  # rises to 1 over the run on a line

    @model_validator(mode="after")
    def _check(self) -> IjepaConfig:
        for name in ("target_scale", "target_aspect", "context_scale"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} is {low:g} .. {high:g}; it must rise")
        if self.predictor_dim % self.predictor_heads or self.predictor_dim % 4:
            raise ValueError(
                f"predictor_dim is {self.predictor_dim}; it must be a multiple of 4 and of predictor_heads "
                f"({self.predictor_heads})"
            )
        return self


def unit_of(section: IjepaConfig, stride: int | None) -> int | None:
    return section.unit or stride


def _check(config: Config, tokens: Tokens | None) -> None:
    method, size = config.method, config.views.global_size
    unit = unit_of(method, getattr(config.encoder, "stride", None))
    if unit is None:
        if tokens is not None:
            raise ValueError(f"set method.unit for this encoder; a token of it is {tokens.stride} px")
        return
    if tokens is not None and unit != tokens.stride:
        raise ValueError(f"method.unit is {unit} px; a token of this encoder is {tokens.stride} px: they must be equal")
    for side in size:
        if side % unit:
            raise ValueError(f"method.unit is {unit} px and does not divide the image's side of {side} px")
    from pretrain.methods.ijepa.masks import check_blocks

    check_blocks(method, (size[0] // unit, size[1] // unit))


def _draw(section: IjepaConfig, image_size: tuple[int, int], stride: int | None, batch_size: int) -> DrawFields | None:
    from pretrain.methods.ijepa.masks import ijepa_masks

    unit = unit_of(section, stride)
    assert unit is not None
    return ijepa_masks(section, (image_size[0] // unit, image_size[1] // unit), batch_size)


SPEC = MethodSpec(
    name="ijepa",
    title="I-JEPA",
    config=IjepaConfig,
    build="pretrain.methods.ijepa.method:build",
    example={
        "min_context": 1,
        "targets": 2,
        "predictor_dim": 32,
        "predictor_depth": 1,
        "predictor_heads": 2,
        "teacher_momentum": 0.9,
    },
    needs=lambda section: Needs(
        drops_any="`selfsight encoders` shows which go with I-JEPA",
        token_map="I-JEPA predicts the features of places: take an encoder whose features form a map",
    ),
    check=_check,
    draw=_draw,
    loss_falls=False,  # its target moves
    metrics={
        "target_std": Metric("deviation of the targets over images", "Diagnostics"),
        "momentum": Metric("teacher momentum", "Schedules"),
    },
    shown="targets",
)
