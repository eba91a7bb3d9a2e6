"""What a method says of itself before torch is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_type_hints

if TYPE_CHECKING:
    from data_pipelines.rng import DrawFields
    from pretrain.config import Config


Group = Literal["Loss", "Diagnostics", "Schedules", "Speed and memory"]


class Crops(NamedTuple):
    """Which crops of an image a method reads."""

    num_global: int = 1
    local: bool = False
    target: str | None = None  # what the target crop is for; None: it is not read
    mixed: bool = False  # whether steps may have crops of other sizes, see `views.mixed_sizes`
    teacher: Literal["encoder", "other"] | None = None
    """Who sees teacher crops where there are any: an encoder like the run's, or another; None: they are not read."""


@dataclass(frozen=True)
class Needs:
    """What a method asks of an encoder. Each is the advice where one can't do it; None: it is not asked."""

    drops_units: str | None = None  # leaves hidden units out before its first block
    drops_any: str | None = None  # likewise, whichever they are: what is left need not be a dense map
    replaces_tokens: str | None = None  # puts a learned token in their place
    several_sizes: str | None = None  # takes crops of two sizes; {h} and {w} in the advice are the global crops' px
    token_map: str | None = None  # its features form a map
    placeless: str | None = None  # tokens that are told no position do not know it


class Tokens(NamedTuple):
    """Sides in px of an encoder's tokens: of those it gives, and of those it begins with."""

    stride: int
    patch: int


class Metric(NamedTuple):
    """What the report and the dashboard say of a metric: its words, its group, and whether it is shown in percent."""

    title: str
    group: Group = "Loss"
    percent: bool = False


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """All that the rest of the system asks of a method; `README.md` beside this says how one is added.

    What runs with torch is named "module:function" and imported when it is called for. `section` is the method's part
    of a configuration, an instance of `config`.

    Args:
        name: In `method.name`.
        title: What it is called in a sentence.
        config: The type of its section, a dataclass with `name: Literal[NAME] = NAME`.
        build: (config, normalisation, timeline) -> Method, freshly initialised from torch's generator.
        example: The smallest section that trains on crops of 32 px, for tests and the table of encoders.
        exports: What a run leaves: a frozen encoder, or a tokenizer.
        headline: The feature that probes read, of encoders that have it; pooled: what stands for an image by itself.
        crops: Which crops it reads.
        stride: Px of a token of its own network, for a method that takes no encoder; each crop is a multiple of it.
        needs: What it asks of an encoder.
        check: Raises ValueError for a configuration that can't run. The encoder's tokens are None while they are not
            known, before a timm model is looked at.
        stacks: Whether it learns from stacks of frames, (b, v, t * c, h, w), as well as from images.
        check_batch: Raises ValueError for a micro-batch of so many rows.
        resolve: The section with every `auto` replaced for so many images, and a line for each; last, the section that
            the run began with, if it has begun.
        native: Whether it takes crops of their own shape (`shape: native`), as it is set.
        native_with: The setting with which it does, and why only so, for who set another.
        masks: Whether its batches hold the masks beside the images.
        draw: What its batches hold beside crops, ids, rows and labels: from (section, image size, stride of the
            encoder, global batch size) to what draws these fields for a row, or None.
        draw_native: `draw` for crops of their own shape: from the section and the batch size to what draws of a row's
            patches.
        learns_from: (config, dataset) -> (n,) bool, of which of its samples it can learn; others are left out.
        left_out: (config) -> a line for each data set of which samples are left out.
        sources: (config) -> None, raises ValueError unless the other runs that it learns from are there and fit.
        alarms: (config, method, since) -> rules of `diagnostics/alarms.py`, beside those of every method.
        loss_falls: Whether a loss that does not fall means that nothing is learned.
        tokenizer: (card) -> the module that takes a saved tokenizer's weights.
        start: (encoder) -> None, how it initialises an encoder where that is not the encoder's own way.
        metrics: Of those that it logs, what is shown of them.
        guessing: Metrics that stand at the logarithm of a setting where nothing better than guessing is learned.
        shown: A setting that is named beside the method.
    """

    name: str
    title: str
    config: type
    build: str
    example: Mapping[str, Any]
    exports: Literal["encoder", "tokenizer"] = "encoder"
    headline: Literal["class", "mean", "pooled"] = "mean"
    crops: Callable[[Any], Crops] = lambda section: Crops()
    stride: Callable[[Any], int] | None = None
    needs: Callable[[Any], Needs] = lambda section: Needs()
    check: Callable[[Config, Tokens | None], None] = lambda config, tokens: None
    stacks: bool = False
    check_batch: Callable[[Config, int], None] = lambda config, rows: None
    resolve: Callable[[Any, int, Any], tuple[Any, list[str]]] = lambda section, images, begun: (section, [])
    native: Callable[[Any], bool] = lambda section: False
    native_with: str = ""
    masks: Callable[[Any], bool] = lambda section: False
    draw: Callable[[Any, tuple[int, int], int | None, int], DrawFields | None] = lambda *given: None
    draw_native: Callable[[Any, int], DrawFields | None] = lambda section, batch_size: None
    learns_from: str | None = None
    left_out: str | None = None
    sources: str | None = None
    alarms: str | None = None
    loss_falls: bool = True
    tokenizer: str | None = None
    start: str | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    guessing: Mapping[str, str] = field(default_factory=dict)
    shown: str | None = None

    def __post_init__(self) -> None:
        names = get_args(get_type_hints(self.config).get("name")) if dataclasses.is_dataclass(self.config) else ()
        if names != (self.name,):
            raise ValueError(f"the section of method {self.name} needs name: Literal[{self.name!r}] = {self.name!r}")

    def call(
        self,
        part: Literal["build", "learns_from", "left_out", "sources", "alarms", "tokenizer", "start"],
        *given: Any,
    ) -> Any:
        """Import what the spec names for `part` and call it; None where it names nothing."""
        target = getattr(self, part)
        return None if target is None else resolve_name(target)(*given)
