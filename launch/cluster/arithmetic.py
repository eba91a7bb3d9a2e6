"""The global batch of a run on so many ranks: ranks x micro-batch x accumulation (imports no torch)."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.config import Config
from pretrain.config.load import ConfigError


def solve_accumulation(config: Config, ranks: int, micro_batch: int | None = None, fixed: bool = False) -> int:
    """The accumulation steps with which `ranks` ranks make the run's global batch.

    With `micro_batch`, images of a rank at a time, they follow from it. Without, the configuration's are taken where
    they divide, else the next larger ones that do: a micro-batch then is no larger than was meant to fit. `fixed`
    says that the user chose the accumulation, so that nothing else will do.

    Raises ConfigError with the nearest choices where there is no answer.
    """
    batch, accumulation = config.train.batch_size, config.train.grad_accum_steps
    if batch % ranks:
        raise ConfigError(
            f"train.batch_size {batch} (global) does not divide over {ranks} ranks. Nearest batch sizes: "
            f"{_two(batch, ranks)}; nearest numbers of ranks for {batch}: {_divisors_near(batch, ranks)} "
            "(nodes x GPUs a node)"
        )
    share = batch // ranks  # images of a rank in a step
    if micro_batch is not None:
        if share % micro_batch:
            raise ConfigError(
                f"--micro-batch {micro_batch}: each of {ranks} ranks has {share} of the {batch} images of a step "
                f"(train.batch_size), which are not whole micro-batches. Nearest micro-batches: "
                f"{_divisors_near(share, micro_batch)}; or train.batch_size={_two(batch, ranks * micro_batch)}"
            )
        if fixed and accumulation != share // micro_batch:
            raise ConfigError(
                f"--micro-batch {micro_batch} over {ranks} ranks makes train.grad_accum_steps {share // micro_batch}, "
                f"and "
                f"train.grad_accum_steps={accumulation} was given as well; leave out one of them"
            )
        return share // micro_batch
    if share % accumulation == 0:
        return accumulation
    if fixed:
        raise ConfigError(
            f"train.grad_accum_steps={accumulation}: each of {ranks} ranks has {share} of the {batch} images of a "
            f"step, "
            f"which do not divide into so many. Nearest: {_divisors_near(share, accumulation)}; or "
            f"train.batch_size={_two(batch, ranks * accumulation)}; or leave it out, and it is chosen"
        )
    return min(number for number in _divisors(share) if number >= min(accumulation, share))


def _two(batch: int, unit: int) -> str:
    """The multiples of `unit` next to `batch`."""
    below = batch // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"


def _divisors(number: int) -> Iterator[int]:
    return (candidate for candidate in range(1, number + 1) if number % candidate == 0)


def _divisors_near(number: int, wanted: int) -> str:
    below = max((divisor for divisor in _divisors(number) if divisor < wanted), default=None)
    above = min((divisor for divisor in _divisors(number) if divisor > wanted), default=None)
    return " or ".join(str(divisor) for divisor in (below, above) if divisor is not None)
