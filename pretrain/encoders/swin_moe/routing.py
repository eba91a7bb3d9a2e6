"""Which expert gets which token: capacity, priority, and how evenly the experts are used. No parameters here.

Tokens are routed in groups, each by itself: what another group holds changes nothing. `t` counts the tokens of a group,
`k` the experts that a token asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

Balance = Literal["importance_load", "shazeer", "gshard"]


@dataclass(frozen=True)
class Choice:
    """What tokens ask for.

    experts: (groups, t, k) int64, best first. gates: (groups, t, k), what an expert's output is multiplied by.
    """

    experts: Tensor
    gates: Tensor


@dataclass(frozen=True)
class Plan:
    """Where tokens go: blocks of places of one size, each block of one expert.

    places: (groups, t, k) int64, the number of a token's place, counted through all blocks; of tokens that are dropped,
        their number together. num_blocks, block_size: of the places. expert_of_block: (num_blocks,) int64; None where
        block b is expert b's.
    """

    places: Tensor
    num_blocks: int
    block_size: int
    expert_of_block: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """(groups, t, k) bool."""
        return self.places < self.num_blocks * self.block_size


def choose(scores: Tensor, top_k: int) -> Choice:
    """The `top_k` experts with the highest scores (groups, t, experts), which are the gates as they are."""
    gates, experts = scores.topk(top_k, dim=-1)
    return Choice(experts, gates)


def capacity_of(tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Places that each expert has for a group of so many tokens."""
    return top_k * int(factor * math.ceil(tokens / num_experts))


def ranks_within(choice: Choice, num_experts: int, prioritised: bool) -> Tensor:
    """(groups, t, k): how many come before a token at the expert it asks for.

    All first choices come before all second ones. Among these the highest gate comes first where `prioritised`
    (batch-prioritised routing, Riquelme et al. 2021), as their first choice has it; else the order of tokens counts.
    """
    experts = choice.experts
    order = None
    if prioritised:
        order = choice.gates[..., 0].detach().argsort(dim=1, descending=True, stable=True)
        experts = experts.gather(1, repeat(order, "g t -> g t k", k=experts.shape[-1]))
    flat = rearrange(experts, "g t k -> g (k t)")
    asked = F.one_hot(flat, num_experts)
    before = (asked.cumsum(dim=1) - asked).gather(2, rearrange(flat, "g n -> g n 1"))
    before = rearrange(before, "g (k t) 1 -> g t k", k=experts.shape[-1])
    if order is not None:
        places = repeat(order, "g t -> g t k", k=experts.shape[-1])
        before = torch.empty_like(before).scatter(1, places, before)
    return before


def limited(choice: Choice, num_experts: int, capacity: int, prioritised: bool) -> Plan:
    """Each expert takes `capacity` tokens of each group, the first of `ranks_within`; the others are dropped.

    Block e holds expert e's places: those of the first group, then of the next.
    """
    groups = choice.experts.shape[0]
    rank = ranks_within(choice, num_experts, prioritised)
    number = torch.arange(groups, device=rank.device).view(-1, 1, 1)
    places = (choice.experts * groups + number) * capacity + rank
    dropped = num_experts * groups * capacity
    return Plan(torch.where(rank < capacity, places, dropped), num_experts, groups * capacity)


def unlimited(choice: Choice, num_experts: int) -> Plan:
    """Every token is taken. No group counts.

    An expert with more tokens than its share has several blocks of the share's size, so that there are two blocks an
    expert at most, whatever the tokens ask for: a number that is known without asking the device.
    """
    shape = choice.experts.shape
    experts = rearrange(choice.experts, "g t k -> (g t k)")
    size = max(1, math.ceil(len(experts) / num_experts))
    order = experts.argsort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
    counts = counts.scatter_add(0, experts, torch.ones_like(experts))
    first_token = counts.cumsum(0) - counts
    blocks = (counts + size - 1) // size
    last_block = blocks.cumsum(0)
    in_order = torch.arange(len(experts), device=experts.device)
    rank = torch.empty_like(experts).scatter(0, order, in_order - first_token[experts[order]])
    places = (last_block - blocks)[experts] * size + rank
    numbers = torch.arange(2 * num_experts, device=experts.device)
    expert_of_block = torch.searchsorted(last_block, numbers, right=True).clamp(max=num_experts - 1)
    return Plan(places.view(shape), 2 * num_experts, size, expert_of_block)


def gathered(tokens: Tensor, plan: Plan) -> Tensor:
    """Tokens (groups, t, d) at their places: (blocks, block size, d), zero where nobody is."""
    top_k = plan.places.shape[-1]
    flat = rearrange(tokens, "g t d -> (g t) d")
    total = plan.num_blocks * plan.block_size
    source = torch.full((total + 1,), len(flat), dtype=torch.int64, device=flat.device)
    numbers = torch.arange(len(flat), device=flat.device)
    source = source.scatter(0, plan.places.view(-1), repeat(numbers, "n -> (n k)", k=top_k))[:total]
    flat = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])
    return flat.index_select(0, source).view(plan.num_blocks, plan.block_size, -1)


def returned(outputs: Tensor, plan: Plan, gates: Tensor) -> Tensor:
    """What the experts made of the places (blocks, block size, d), back at its tokens, times the gates and summed:
    (groups, t, d); zero for tokens that were dropped."""
    groups, t, top_k = plan.places.shape
    places = plan.places.clamp(max=plan.num_blocks * plan.block_size - 1).view(-1)
    found = outputs.flatten(0, 1).index_select(0, places).view(groups, t, top_k, -1)
    gates = torch.where(plan.kept, gates, 0.0).to(found.dtype)
    kept = rearrange(plan.kept, "g t k -> g t k 1")
    return torch.where(kept, found * rearrange(gates, "g t k -> g t k 1"), 0.0).sum(dim=2)


def balance_loss(kind: Balance, logits: Tensor, noisy: Tensor, choice: Choice, noise: float) -> Tensor:
    """() how unevenly experts are used, the mean over the groups.

    `importance_load` is half the sum of Shazeer et al.'s losses (2017, appendix A and section 4) in tutel's form, which
    compares the probabilities without noise, not the logits, with the noisy logit that an expert must beat; `shazeer`
    compares the logits. `gshard` (Lepikhin et al. 2021, algorithm 1): experts times the sum over them of their mean
    gate times their share of first choices.

    Args:
        logits, noisy: (groups, t, experts), without and with noise, fp32.
        noise: Standard deviation of the noise in training, of each logit.
    """
    experts = logits.shape[-1]
    if kind == "gshard":
        gate = reduce(noisy.softmax(dim=-1), "g t e -> g e", "mean")
        share = reduce(F.one_hot(choice.experts[..., 0], experts).to(gate.dtype), "g t e -> g e", "mean")
        return experts * (gate * share).sum(dim=-1).mean()
    scores = logits.softmax(dim=-1)
    threshold = noisy.gather(2, choice.experts[..., -1:])
    above = (scores if kind == "importance_load" else logits) - threshold
    load = torch.special.ndtr(above / noise).sum(dim=1)
    return ((_variation(scores.sum(dim=1)) + _variation(load)) / 2).mean()


def _variation(amounts: Tensor) -> Tensor:
    """Squared coefficient of variation of (groups, experts) over the experts, with the unbiased variance."""
    return amounts.var(dim=1) / (amounts.mean(dim=1).square() + 1e-10)
