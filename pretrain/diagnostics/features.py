"""Features of the frozen encoder while it trains, and how much of their space they fill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.continuing.low_rank import without_changes
from pretrain.encoders import Encoder, Features, build_encoder
from pretrain.encoders.native import PackedFeatures, PackedImages, mean_of_each
from pretrain.engines.engine import whole_state_dict

MOST_ROWS = 4096  # of which the rank is taken


@contextmanager
def evaluating(engine: nn.Module, precision: str, device: torch.device) -> Iterator[None]:
    """Evaluation mode, without gradients, in the precision of the run; afterwards it trains again."""
    engine.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32"):
            yield
    finally:
        engine.train()


def whole_encoder(encoder: Encoder, config: Config, device: torch.device) -> Encoder:
    """An encoder that can be asked without the other ranks: itself, or a whole copy under ZeRO 3 and where ranks divide
    its experts. Collective.

    DeepSpeed fetches weights ahead in the order in which training used them: forward passes of a part of the model
    between two steps upset it, and ranks have hung.
    """
    if config.engine.zero_stage < 3 and not config.engine.expert_parallel:
        return encoder
    assert config.encoder is not None
    state = whole_state_dict(encoder)
    with torch.random.fork_rng(devices=[]):
        size, channels = config.views.global_size, config.data.channels
        mask_token, frames = "mask_token" in state, config.data.frames
        copy = build_encoder(config.encoder, size, channels, mask_token=mask_token, frames=frames)
    copy.load_state_dict(without_changes(encoder, state))
    return copy.to(device).eval()


def headline(features: Features | PackedFeatures, name: str | None) -> Tensor:
    """(b, d) fp32, the feature that the probe's headline reads: `class`, `mean`, or None for the pooled one."""
    if name == "class":
        assert features.prefix_tokens is not None
        return features.prefix_tokens[:, 0].float()
    if isinstance(features, PackedFeatures):
        return (features.pooled if name is None else mean_of_each(features.tokens, features.lengths)).float()
    return (features.pooled if name is None else features.tokens.mean(dim=1)).float()


def frozen_features(encoder: Encoder, images: Tensor | PackedImages, name: str | None) -> Tensor:
    """(b, d) fp32 of images (b, c, h, w) or packed, normalised; inside of `evaluating`, of a `whole_encoder`."""
    return headline(encoder(images), name)


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """Rows (n, d) of every rank, equally many on each, one below the other. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    gathered = rows.new_empty(dist.get_world_size() * len(rows), rows.shape[1])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """The effective rank of features (n, d): exp of the entropy of their singular values' shares.

    RankMe (Garrido et al. 2023, equation 1), between 1 and min(n, d), in fp64 by the eigenvalues of the smaller Gram
    matrix. All zero: 1.
    """
    values = features.double()
    gram = values @ values.T if len(values) < values.shape[1] else values.T @ values
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if singular.sum() == 0:
        return 1.0
    shares = singular / singular.sum() + eps
    return float((-(shares * shares.log()).sum()).exp().clamp(1.0, float(min(values.shape))))


def feature_statistics(features: Tensor) -> dict[str, float]:
    """Of features (n, d) of the whole batch.

    rankme, rankme_share: the effective rank, and its share of min(n, d). feature_std: deviation of the features'
    directions over the images, averaged over dimensions, times sqrt(d): 1 is spread evenly, 0 collapsed. Nothing where
    not all of them are finite.
    """
    if not torch.isfinite(features).all():  # the next loss says so, and is told of with the layer
        return {}
    found = rankme(features)
    directions = F.normalize(features.double(), dim=-1)
    deviation = directions.std(dim=0, unbiased=False).mean() * features.shape[1] ** 0.5
    return {"rankme": found, "rankme_share": found / min(features.shape), "feature_std": float(deviation)}
