"""A feed-forward network of many experts, each token going to a few of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.encoders.divided import Ranks, exchanged, exchanged_back, keep_part, whole
from pretrain.encoders.swin_moe.config import SwinMoeConfig
from pretrain.encoders.swin_moe.gate import CosineGate, LinearGate, normals
from pretrain.encoders.swin_moe.routing import balance_loss, capacity_of, choose, gathered, limited, returned, unlimited


class Routed(NamedTuple):
    """What became of a pass through a layer of experts.

    tokens: (b, h, w, d). balance: () the loss, 0 in evaluation. dropped: () share of the choices that found no place.
    load: (experts,) share of the choices that each expert was asked for, times the number of experts: 1 is even.
    """

    tokens: Tensor
    balance: Tensor
    dropped: Tensor
    load: Tensor


class ExpertLinear(nn.Module):
    """A linear layer of every expert, `weight` (experts, out, in)."""

    def __init__(self, num_experts: int, inputs: int, outputs: int, bias: bool, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(num_experts, outputs)) if bias else None
        nn.init.trunc_normal_(self.weight, std=std)

    def forward(self, tokens: Tensor, expert_of_block: Tensor | None) -> Tensor:
        """Blocks of tokens (blocks, n, in), each of one expert, to (blocks, n, out); None: block e is of expert e, of
        those that this rank holds."""
        weight, bias = self.weight, self.bias
        if expert_of_block is not None:
            weight = whole(weight).index_select(0, expert_of_block)
            bias = None if bias is None else whole(bias).index_select(0, expert_of_block)
        weight = rearrange(weight, "e o i -> e i o")
        if bias is None:
            return torch.bmm(tokens, weight)
        return torch.baddbmm(rearrange(bias.to(tokens.dtype), "e o -> e 1 o"), tokens, weight)


class Experts(nn.Module):
    """fc1, GELU, fc2 of every expert.

    Where ranks divide them, tokens at an expert's places go to whom it belongs; where places are not counted by expert,
    the experts come to the tokens.
    """

    def __init__(self, dim: int, config: SwinMoeConfig) -> None:
        super().__init__()
        self.num_experts = config.experts
        self.ranks: Ranks | None = None
        hidden = int(dim * config.mlp_ratio)
        self.fc1 = ExpertLinear(config.experts, dim, hidden, True, config.expert_std)
        self.fc2 = ExpertLinear(config.experts, hidden, dim, config.fc2_bias, config.expert_std)
        self.dropout = nn.Dropout(config.expert_dropout)

    def divide(self, ranks: Ranks) -> None:
        """Keep this rank's part of the experts."""
        self.ranks = ranks
        for parameter in self.parameters():
            keep_part(parameter, ranks)

    def forward(self, tokens: Tensor, expert_of_block: Tensor | None = None) -> Tensor:
        """As `ExpertLinear`, of all experts."""
        ranks = self.ranks if expert_of_block is None else None
        hidden = self.dropout(F.gelu(self.fc1(exchanged(tokens, ranks), expert_of_block)))
        return exchanged_back(self.fc2(hidden, expert_of_block), ranks)


class MoeMlp(nn.Module):
    """Routes tokens to experts, `config` says how.

    In training an expert has `capacity_factor` of its share of places, counted over `group` images; in evaluation
    every token finds a place, so that what is made of an image depends on no other one.

    Args:
        number: Of this layer among the encoder's, which tells its noise from the others'.
    """

    def __init__(self, dim: int, config: SwinMoeConfig, number: int) -> None:
        super().__init__()
        self.config, self.number = config, number
        self.gate: nn.Module
        if config.router == "cosine":
            self.gate = CosineGate(dim, config.experts, config.cosine_dim)
        else:
            self.gate = LinearGate(dim, config.experts)
        self.experts = Experts(dim, config)

    @torch.compiler.disable  # a graph of routes takes minutes to trace; attention is compiled without it
    def forward(self, tokens: Tensor, group: int, keys: Tensor | None) -> Routed:
        """Tokens (b, h, w, d) of images in groups of `group`, with the keys (b,) of their noise; None is none."""
        config, (_, height, width, _) = self.config, tokens.shape
        num, factor = config.experts, config.capacity_factor if self.training else None
        logits = noisy = self.gate(tokens)
        if keys is not None and self.training and config.gate_noise:
            drawn = normals(keys, self.number << 32, (height * width, num))
            noisy = logits + drawn.view(logits.shape) * config.noise_deviation
        in_groups = "(g m) h w e -> g (m h w) e"
        logits, noisy, grouped = (rearrange(x, in_groups, m=group) for x in (logits, noisy, tokens))
        choice = choose(noisy.softmax(dim=-1), config.top_k)
        if factor is None:
            plan = unlimited(choice, num)
        else:
            capacity = capacity_of(grouped.shape[1], num, config.top_k, factor)
            plan = limited(choice, num, capacity, config.prioritised)
        with_places = gathered(grouped, plan)
        mixed = returned(self.experts(with_places, plan.expert_of_block), plan, choice.gates)
        mixed = rearrange(mixed, "g (m h w) d -> (g m) h w d", m=group, h=height, w=width)
        balance = logits.new_zeros(())
        if self.training:
            balance = balance_loss(config.balance, logits, noisy, choice, config.noise_deviation)
        load = F.one_hot(choice.experts, num).float().mean(dim=(0, 1, 2)) * num
        return Routed(mixed, balance, 1 - plan.kept.float().mean(), load)
