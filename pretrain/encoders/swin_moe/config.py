"""Swin-MoE's settings, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import SwinShape
from pretrain.encoders.spec import EncoderSpec, Example, Layout
from pretrain.methods.spec import Metric

if TYPE_CHECKING:
    from pretrain.config import Config


@section
class SwinMoeConfig(SwinShape):
    """Swin with a mixture of experts in some blocks (Hwang et al. 2023)."""

    family: Literal["swin_moe"] = "swin_moe"
    decisive = ("dim", "depths", "heads", "experts", "expert_blocks", "router", "mlp_ratio", "fc2_bias", "cosine_dim")
    size: Literal["tiny", "small", "base", "large"] = "small"  # names dim, depths and heads
    window: PositiveInt = 12  # side in tokens; a stage whose map is smaller has one window of its map's shorter side
    windows: tuple[PositiveInt, ...] | None = None  # of each stage, where weights were made for other images
    mlp_ratio: PositiveFloat = 4.0  # width of the feed-forward networks, dense and experts', over that of the tokens
    fc2_bias: bool = False  # of their second layer
    experts: Annotated[int, Field(ge=2)] = 8  # of each layer that has them
    expert_blocks: tuple[tuple[NonNegativeInt, ...], ...] | None = None
    """Of each stage, the numbers of the blocks that have experts; default: every second of the last two stages."""
    top_k: PositiveInt = 1  # experts that a token goes to
    router: Literal["linear", "cosine"] = "linear"  # how tokens and experts are compared
    cosine_dim: PositiveInt = 256  # of the cosine router
    capacity_factor: PositiveFloat | None = 1.25
    """Places of an expert in training, over its even share of tokens; null: no token is dropped, as in evaluation."""
    group: PositiveInt = 8
    """Rows of the global batch over which capacity, priority and balance are counted; each crop of them by itself."""
    prioritised: bool = True  # the most certain tokens get places first, else those that come first
    gate_noise: NonNegativeFloat = 1.0  # deviation of the noise on a router's logits in training, over the experts
    balance: Literal["importance_load", "shazeer", "gshard"] = "importance_load"  # see `routing.balance_loss`
    balance_weight: NonNegativeFloat = 0.01  # of the sum over layers, beside the method's loss
    expert_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # after GELU; its draws differ with ranks
    expert_std: PositiveFloat = 0.005  # of the experts' weights at the start
    log_loads: bool = True  # of every expert and layer; else only the highest and lowest

    @property
    def noise_deviation(self) -> float:
        """Of each logit."""
        return self.gate_noise / self.experts

    def expert_blocks_of(self, stage: int) -> tuple[int, ...]:
        """Numbers, within a stage, of the blocks that have experts."""
        depths = self.shape[1]
        if self.expert_blocks is not None:
            return self.expert_blocks[stage]
        return tuple(range(1, depths[stage], 2)) if stage >= len(depths) - 2 else ()

    def window_of(self, stage: int, image_size: tuple[int, int]) -> int:
        """Side of a stage's windows, for images of so many px."""
        if self.windows is not None:
            return self.windows[stage]
        return max(1, min(self.window, min(image_size) // (self.patch * 2**stage)))

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        depths = self.shape[1]
        for name, given in (("windows", self.windows), ("expert_blocks", self.expert_blocks)):
            if given is not None and len(given) != len(depths):
                raise ValueError(f"{name} names {len(given)} stages and depths {len(depths)}; give one entry a stage")
        for stage, depth in enumerate(depths):
            outside = [index for index in self.expert_blocks_of(stage) if index >= depth]
            if outside:
                raise ValueError(f"expert_blocks names block {outside[0]} of stage {stage}, which has 0 .. {depth - 1}")
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k} and there are {self.experts} experts; it is at most that many")
        if self.balance != "gshard" and not self.gate_noise:
            raise ValueError(
                f"balance {self.balance} counts how often an expert is chosen under the noise, and gate_noise is 0; "
                "set balance=gshard, or another gate_noise"
            )
        return self


def check_batch(config: Config, rows: int) -> None:
    """Raise ValueError where a micro-batch does not consist of whole groups."""
    group = config.encoder.group
    if rows % group:
        raise ValueError(
            f"encoder.group is {group}: experts count their places over so many rows, and a micro-batch has {rows}; "
            "set encoder.group to a divisor of it, the same on any number of ranks to see the same routes"
        )


_SMALL = {
    "dim": 8, "depths": (2, 2), "heads": (1, 2), "patch": 8, "window": 4, "experts": 2, "mlp_ratio": 2.0, "group": 2,
}  # fmt: skip

SPEC = EncoderSpec(
    name="swin_moe",
    title="Swin-MoE",
    description="Swin with a mixture of experts (Hwang et al. 2023)",
    config=SwinMoeConfig,
    build="pretrain.encoders.swin_moe.encoder:SwinMoeEncoder",
    drop_layout="one_in_2x2",
    layouts={"swin_moe": Layout("pretrain.encoders.swin_moe.layouts:read_swin_moe")},
    examples=(
        Example(small=_SMALL),
        Example({"router": "cosine"}, {**_SMALL, "cosine_dim": 4, "top_k": 2}),
    ),
    check_batch=check_batch,
    metrics={
        "moe_balance": Metric("how unevenly experts are used (balance loss)"),
        "method_loss": Metric("loss of the method alone"),
        "moe_dropped": Metric("tokens that found no place at their expert", "Diagnostics", percent=True),
        "moe_load_highest": Metric("load of the busiest expert (1 is even)", "Diagnostics"),
        "moe_load_lowest": Metric("load of the idlest expert (1 is even)", "Diagnostics"),
    },
)
