"""The dVAE's section, and what is known of the method (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from data_pipelines.transforms.config import Share, section
from pretrain.methods.spec import MethodSpec, Metric


@section
class DvaeConfig:
    """A discrete variational autoencoder (Ramesh et al. 2021, appendix A): the tokenizer of BEiT v1.

    Schedules are shares of the run, the published ones at 3 million updates being 150,000 for the temperature and
    5,000 for the weight of the divergence.
    """

    name: Literal["dvae"] = "dvae"
    vocab_size: PositiveInt = 8192  # codes
    hidden: PositiveInt = 256  # width
    blocks_per_group: PositiveInt = 2  # of encoder and decoder
    groups: Annotated[int, Field(ge=1)] = 4  # resolutions; the code map is the image / 2^(groups - 1)
    temperature: PositiveFloat = 1.0  # of Gumbel-softmax, at the start
    temperature_end: PositiveFloat = 0.0625  # and from temperature_share on
    temperature_share: Share = 0.05  # of the run until temperature_end, on a cosine
    kl_weight: NonNegativeFloat = 6.6  # of the divergence from a uniform use of the codes
    kl_share: Share = 0.0017  # of the run until the full weight, linear
    average_momentum: Share = 0.999  # of the weights that are saved
    start: Literal["published", "spread"] = "published"
    """`spread`: places differ in their codes from the first step. As published they begin nearly alike, and a run of
    some thousand steps ends with a handful of codes in use."""


SPEC = MethodSpec(
    name="dvae",
    title="dVAE",
    config=DvaeConfig,
    build="pretrain.methods.dvae.method:build",
    example={
        "vocab_size": 32,
        "hidden": 8,
        "blocks_per_group": 1,
        "groups": 3,
        "average_momentum": 0.5,
        "kl_weight": 0.05,
        "start": "spread",
    },
    exports="tokenizer",
    stride=lambda section: 2 ** (section.groups - 1),
    tokenizer="pretrain.methods.dvae.network:empty_tokenizer",
    alarms="pretrain.methods.dvae.alarms:alarms",
    metrics={
        "likelihood": Metric("negative log-likelihood"),
        "divergence": Metric("divergence to uniform"),
        "codes_used": Metric("codes used", "Diagnostics", percent=True),
        "code_perplexity": Metric("code perplexity", "Diagnostics"),
        "temperature": Metric("temperature", "Schedules"),
        "kl_weight": Metric("weight of the divergence", "Schedules"),
    },
    shown="vocab_size",
)
