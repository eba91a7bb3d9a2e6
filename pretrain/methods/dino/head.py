"""The projection head of DINO (Caron et al. 2021, appendix C)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.methods.dino.config import DinoConfig, IbotConfig


class DinoHead(nn.Module):
    """Three linear layers with GELU, l2-normalised, then a projection to the prototypes: weight-normalised, or plain as
    in DINOv3 (Simeoni et al. 2025).

    With `ibot`, the patch tokens' own, of the sizes that it names.
    """

    def __init__(self, dim: int, config: DinoConfig, ibot: IbotConfig | None = None) -> None:
        super().__init__()
        hidden, bottleneck = config.head_hidden_dim, config.head_bottleneck_dim
        if ibot is not None:
            hidden, bottleneck = ibot.head_hidden_dim or hidden, ibot.head_bottleneck_dim or bottleneck
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.num_prototypes = (ibot and ibot.prototypes) or int(config.prototypes)
        self.last_layer: nn.Module
        if config.last_layer == "plain":
            self.last_layer = nn.Linear(bottleneck, self.num_prototypes, bias=False)
            nn.init.trunc_normal_(self.last_layer.weight, std=0.02)
        else:
            self.last_layer = WeightNormLinear(bottleneck, self.num_prototypes, fixed_norm=config.norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        """(n, d) -> (n, k)."""
        bottleneck = self.mlp(features)
        # cosines are divided by temperatures as low as .02: in bf16 their rounding alone would be worth .2 nats
        with torch.autocast(features.device.type, enabled=False):
            return self.last_layer(F.normalize(bottleneck.float(), dim=-1, eps=1e-12))


class WeightNormLinear(nn.Module):
    """y = g * v / |v| x without bias, its norms `weight_g` fixed at 1 if `fixed_norm` (Salimans and Kingma 2016)."""

    def __init__(self, dim: int, num_outputs: int, fixed_norm: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(nn.Linear(dim, num_outputs, bias=False).weight.detach())
        self.weight_g = nn.Parameter(torch.ones(num_outputs, 1), requires_grad=not fixed_norm)

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, k)."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1, eps=0.0))
