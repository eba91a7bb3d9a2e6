"""VQ-KD's section, and what is known of the method (imports no torch)."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt

from data_pipelines.transforms.config import Share, section
from pretrain.methods.spec import MethodSpec, Metric, Needs


@section
class VqkdConfig:
    """Vector-quantised knowledge distillation (Peng et al. 2022): the tokenizer of BEiT v2."""

    name: Literal["vqkd"] = "vqkd"
    teacher: str  # a run, a checkpoint or an encoder folder, or timm:NAME
    vocab_size: PositiveInt = 8192  # of the codebook
    code_dim: PositiveInt = 32  # length of a code
    momentum: Share = 0.99  # of the codebook's slow average
    commitment: NonNegativeFloat = 1.0  # weight of the loss that draws tokens to their codes
    decoder_depth: PositiveInt = 3  # blocks
    decoder_dim: PositiveInt | None = None  # default: the encoder's width
    decoder_heads: PositiveInt | None = None  # default: one for 64 of the width, at least 1
    kmeans_iterations: PositiveInt = 10  # that put the codes on the first batch
    restart_below: NonNegativeFloat = 0.0  # of its even share: a code used less is put on a token; 0: none, as theirs


SPEC = MethodSpec(
    name="vqkd",
    title="VQ-KD",
    config=VqkdConfig,
    build="pretrain.methods.vqkd.method:build",
    example={
        "teacher": "timm:vit_tiny_patch16_224",
        "vocab_size": 16,
        "code_dim": 8,
        "decoder_depth": 1,
        "decoder_heads": 2,
        "momentum": 0.8,
        "restart_below": 0.2,
    },
    exports="tokenizer",
    needs=lambda section: Needs(token_map="`selfsight encoders` shows what goes together"),
    sources="pretrain.methods.vqkd.teacher:check_teacher",
    tokenizer="pretrain.methods.vqkd.network:empty_tokenizer",
    alarms="pretrain.methods.vqkd.alarms:alarms",
    metrics={
        "distillation": Metric("distillation loss"),
        "commitment": Metric("commitment loss"),
        "codes_used": Metric("codes used", "Diagnostics", percent=True),
        "codes_alive": Metric("codes alive", "Diagnostics", percent=True),
        "code_perplexity": Metric("code perplexity", "Diagnostics"),
    },
    shown="vocab_size",
)
