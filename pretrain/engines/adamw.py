"""AdamW that asks the device for nothing: clips, leaves out what is not finite, and needs no parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from pretrain.encoders.divided import division_of

MOMENTS = ("exp_avg", "exp_avg_sq")


class Stretch(NamedTuple):
    """A part of a parameter, where the optimizer updates it: `numel` elements of the flat `master` from `start` on."""

    parameter: nn.Parameter
    master: Tensor
    start: int
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        """These elements of a tensor as long as the master."""
        return flat if self.numel == flat.numel() else flat.view(-1).narrow(0, self.start, self.numel)


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019), fused, over wherever a parameter lies.

    Each of `param_groups` has its own rate and decay, and perhaps `bounds` that a step does not leave. DeepSpeed's ZeRO
    makes a flat tensor of every group, and a collective and a few host waits of every flat tensor; `merge` shows it a
    single group, and `attach` says which parameter lies where in what it made of that.

    A step whose gradients are not finite changes neither weights nor moments; nobody waits to learn of it.

    Args:
        groups: As torch's AdamW takes them; `lr` and `weight_decay` of each are read at each step.
        betas, eps: Of the moments.
        clip: Gradients are scaled down to this global norm; 0 is never.

    Attributes:
        norm: () of the last step's gradients, before clipping, of all ranks together; on the device.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float, clip: float = 0.0) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.rules = self.param_groups
        self.betas, self.eps, self.clip = betas, eps, clip
        self.norm: Tensor | None = None
        self._divided = False  # whether other ranks hold other parts of the parameters
        self._comm_device: torch.device | None = None
        self._taken: Tensor | None = None  # steps, but for those left out
        self._stretches: list[list[Stretch]] = []
        whole = [p for group in self.rules for p in group["params"]]
        self.attach([Stretch(p, p, 0, p.numel()) for p in whole])

    def merge(self) -> None:
        """Show one group of all parameters to who looks at `param_groups`; `rules` are those that count."""
        self.param_groups = [{**self.defaults, "params": [p for group in self.rules for p in group["params"]]}]

    def attach(self, stretches: Iterable[Stretch], divided: bool = False, device: torch.device | None = None) -> None:
        """Update these, of parameters of which other ranks hold the rest if they are `divided`.

        `device`: through which ranks talk; default: the masters' own.
        """
        number = {id(p): rule for rule, group in enumerate(self.rules) for p in group["params"]}
        self._stretches = [[] for _ in self.rules]
        for stretch in stretches:
            self._stretches[number[id(stretch.parameter)]].append(stretch)
        self._divided, self._comm_device, self._taken = divided, device, None

    @property
    def masters(self) -> list[Tensor]:
        """What is updated, each once."""
        return list({id(s.master): s.master for part in self._stretches for s in part}.values())

    def begin(self, steps: float = 0.0) -> None:
        """Moments of zero for all that is updated, as after so many steps."""
        masters = self.masters
        self._taken = torch.full((), steps, device=masters[0].device if masters else None)
        for master in masters:
            zeros = {name: torch.zeros_like(master, memory_format=torch.preserve_format) for name in MOMENTS}
            self.state[master] = {"step": self._taken, **zeros}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step by the masters' gradients; those of which there is none have nothing to learn."""
        assert closure is None
        if self._taken is None:
            self.begin()
        assert self._taken is not None
        held = [
            [(stretch, stretch.of(stretch.master.grad)) for stretch in part if stretch.master.grad is not None]
            for part in self._stretches
        ]
        self.norm = self._global_norm([found for part in held for found in part])
        norm = self.norm.to(self._taken.device)
        bad = torch.where(norm.isfinite(), 0.0, 1.0)
        scale = ((norm + 1e-6) / self.clip).clamp_min(1.0) if self.clip else None
        for group, part in zip(self.rules, held, strict=True):
            if part:
                self._update(group, part, bad, scale)
        self._taken += 1 - bad

    def _update(
        self, group: dict[str, Any], part: list[tuple[Stretch, Tensor]], bad: Tensor, scale: Tensor | None
    ) -> None:
        assert self._taken is not None
        adamw(
            [stretch.of(stretch.master) for stretch, _ in part],
            [gradient for _, gradient in part],
            *([stretch.of(self.state[stretch.master][moment]) for stretch, _ in part] for moment in MOMENTS),
            [],
            list(self._taken.repeat(len(part)).unbind()),  # it counts each
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.eps,
            maximize=False,
            grad_scale=scale,
            found_inf=bad,
        )
        if group.get("bounds") is not None:
            low, high = group["bounds"]
            for stretch, _ in part:
                stretch.of(stretch.master).clamp_(low, high)

    def _global_norm(self, held: list[tuple[Stretch, Tensor]]) -> Tensor:
        apart = [(stretch, gradient) for stretch, gradient in held if division_of(stretch.parameter) is not None]
        gradients = [gradient for stretch, gradient in held if division_of(stretch.parameter) is None]
        device = gradients[0].device if gradients else self._comm_device or torch.device("cpu")
        norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
        if self._divided and dist.is_initialized() and dist.get_world_size() > 1:
            squares = norm.to(self._comm_device or device, torch.float64).square()  # in fp32 they end at 1e38
            dist.all_reduce(squares)
            norm = squares.sqrt().float()
        if apart:  # of which each rank of a group holds other rows
            division = division_of(apart[0][0].parameter)
            assert division is not None
            squares = nn.utils.get_total_norm([gradient for _, gradient in apart]).double().square()
            dist.all_reduce(squares, group=division.ranks.group)
            norm = (norm.double().square() + squares).sqrt().float()
        return norm
