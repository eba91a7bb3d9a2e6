"""LeJEPA's section, and what is known of the method (imports neither torch nor NumPy)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from data_pipelines.transforms.config import section
from pretrain.methods.spec import Crops, MethodSpec, Metric, Needs, Tokens

if TYPE_CHECKING:
    from pretrain.config import Config


@section
class LejepaConfig:
    """Views of an image agree while all images spread as a normal cloud (Balestriero and LeCun 2025): no teacher, no
    stop-gradient, no predictor, one hyperparameter."""

    name: Literal["lejepa"] = "lejepa"
    weight: Annotated[float, Field(gt=0, lt=1)] = 0.02  # of SIGReg; the agreement of views has the rest
    views: PositiveInt = 2  # global crops of an image, whose mean all crops are drawn to
    slices: PositiveInt = 256  # random directions a step
    knots: Annotated[int, Field(ge=2)] = 17  # places where characteristic functions are compared
    furthest_knot: PositiveFloat = 3.0  # the last of them
    embedding_dim: PositiveInt | None = None  # of a linear layer before the projector; null: there is none
    projector_hidden_dim: PositiveInt = 2048  # width of its two hidden layers
    projector_dim: Annotated[int, Field(ge=2)] = 16  # of the cloud
    projector_norm: Literal["batch", "layer"] = "batch"  # batch: over the micro-batch of all ranks, as published


def _check(config: Config, tokens: Tokens | None) -> None:
    if config.method.views == 1 and config.views.local_crops is None:
        raise ValueError(
            "method.views is 1 and views.local_crops null, so that an image has no second view to agree with; give "
            "method.views=2 with two views.global_crops, or local crops"
        )
    if config.train.batch_size < 2:
        raise ValueError("train.batch_size is 1; SIGReg compares the images of a step with a cloud: take many")


def _check_batch(config: Config, rows: int) -> None:
    if config.method.projector_norm == "batch" and rows == 1:
        raise ValueError(
            "method.projector_norm is batch and a micro-batch has one image; give each rank and accumulation step two "
            "or more, or set method.projector_norm=layer"
        )


SPEC = MethodSpec(
    name="lejepa",
    title="LeJEPA",
    config=LejepaConfig,
    build="pretrain.methods.lejepa.method:build",
    example={"slices": 16, "projector_hidden_dim": 32, "projector_dim": 8, "weight": 0.05},
    crops=lambda section: Crops(num_global=section.views, local=True),
    needs=lambda section: Needs(
        several_sizes="Use local crops of the global size (views.local_crops.size=[{h}, {w}]), or none "
        "(views.local_crops=null)"
    ),
    check=_check,
    stacks=True,
    check_batch=_check_batch,
    alarms="pretrain.methods.lejepa.alarms:alarms",
    metrics={
        "sigreg": Metric("SIGReg (distance from a normal cloud)"),
        "disagreement": Metric("disagreement of views"),
    },
    shown="weight",
)
