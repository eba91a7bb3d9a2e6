"""HorNet's settings, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import EncoderSettings
from pretrain.encoders.spec import EncoderSpec, Example, Layout

# width of the first stage, depths of the four stages
HORNET_SIZES = {
    "tiny": (64, (2, 3, 18, 2)),
    "small": (96, (2, 3, 18, 2)),
    "base": (128, (2, 3, 18, 2)),
    "large": (192, (2, 3, 18, 2)),
}


@section
class HorNetConfig(EncoderSettings):
    """HorNet (Rao et al. 2022): recursive gated convolutions; `size` names dim and depths, each may be set by itself.

    `filter` is what a gated convolution looks around with: `local`, 7x7 depth-wise in all stages (HorNet), or
    `global`, in the last stages a learned filter over all frequencies of the map (HorNet_GF).
    """

    family: Literal["hornet"] = "hornet"
    decisive = ("dim", "depths", "orders", "filter", "filters")
    size: Literal["tiny", "small", "base", "large"] = "tiny"  # names dim and depths
    filter: Literal["local", "global"] = "local"  # 7x7 convolutions in all stages, or global filters in the last ones
    dim: PositiveInt | None = None  # width of the first stage
    depths: tuple[PositiveInt, ...] | None = None  # blocks of each stage
    orders: tuple[Annotated[int, Field(ge=2)], ...] = (2, 3, 4, 5)  # of the gated convolutions, by stage
    # frequencies (rows, half of the columns + 1) of the last stages' filters; resized to maps of another size
    filters: tuple[tuple[PositiveInt, PositiveInt], ...] = ((14, 8), (7, 4))  # published: those of 224 px
    gate_scale: PositiveFloat = 1 / 3  # what the gates are multiplied by
    patch: PositiveInt = 4  # side in px
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stochastic depth, of the last block

    @property
    def shape(self) -> tuple[int, tuple[int, ...]]:
        """Width of the first stage, blocks per stage."""
        dim, depths = HORNET_SIZES[self.size]
        return self.dim or dim, self.depths or depths

    @property
    def stage_filters(self) -> tuple[tuple[int, int] | None, ...]:
        """Of each stage the frequencies of its global filters; None for 7x7 convolutions."""
        stages = len(self.shape[1])
        filters = self.filters if self.filter == "global" else ()
        return (None,) * (stages - len(filters)) + filters

    @property
    def stride(self) -> int:
        """Pixels per output token."""
        return self.patch * 2 ** (len(self.shape[1]) - 1)

    @model_validator(mode="after")
    def _check(self) -> HorNetConfig:
        dim, depths = self.shape
        if len(self.orders) != len(depths):
            raise ValueError(
                f"depths {depths} name {len(depths)} stages and orders {self.orders} name {len(self.orders)}; set both"
            )
        if len(self.stage_filters) > len(depths):
            raise ValueError(f"filters {self.filters} are of {len(self.filters)} stages, and there are {len(depths)}")
        for stage, (order, frequencies) in enumerate(zip(self.orders, self.stage_filters, strict=True)):
            parts = 2 ** (order - 1) * (1 if frequencies is None else 2)  # a global filter takes half of the channels
            if dim * 2**stage % parts:
                raise ValueError(
                    f"stage {stage} is {dim * 2**stage} wide; with order {order} and a "
                    f"{'7x7 convolution' if frequencies is None else 'global filter'} it must be a multiple of {parts}"
                )
        return self


_SMALL = {"dim": 8, "depths": (1, 1), "orders": (2, 3), "patch": 8}

SPEC = EncoderSpec(
    name="hornet",
    title="HorNet",
    description="HorNet (Rao et al. 2022)",
    config=HorNetConfig,
    build="pretrain.encoders.hornet.encoder:HorNetEncoder",
    drop_layout="one_in_2x2",
    headline=lambda config: None,  # the norm of the mean, not the mean of the normed tokens
    layouts={"hornet": Layout("pretrain.encoders.hornet.layouts:read_hornet")},
    examples=(
        Example(small=_SMALL),
        Example({"filter": "global"}, {**_SMALL, "filters": ((8, 5), (4, 3))}),
    ),
)
