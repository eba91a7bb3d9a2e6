"""What a family of encoders says of itself (imports no torch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_type_hints

from pretrain.methods.spec import Metric

if TYPE_CHECKING:
    from pretrain.config import Config


class Layout(NamedTuple):
    """How a family reads the official checkpoints of one layout (`selfsight import --as`).

    read: "module:function" from `layouts.CheckpointState` to `layouts.Imported`.
    marks: a regular expression that one of the keys matches, where several families read a layout of that name.
    signs: sets of regular expressions. Where a key is found for each of one set, or for `model_type=NAME` of a
        config.json beside the file, it is certainly this layout's.
    """

    read: str
    marks: str = ""
    signs: tuple[tuple[str, ...], ...] = ()


class Example(NamedTuple):
    """A row of the table of `selfsight encoders`, and the same in small, which the tests train."""

    settings: Mapping[str, Any] = {}
    small: Mapping[str, Any] = {}  # beside `settings`; sizes that train in milliseconds
    side: int = 64  # px of the small one's images


@dataclass(frozen=True)
class EncoderSpec:
    """All that is known of a family without building one of its encoders.

    name: as in `encoder.family`. title: what it is called in a sentence.
    config: its section of a configuration, a `section` with `family: Literal[name]`,
        `stride` and `patch` in px, `drop_path`, and `decisive`: what decides how weights are to be read.
    build: "module:Class" of its `base.Encoder`, called with (config, image_size, channels, mask_token).
    drop_layout: which units may be dropped, `any`, `one_in_2x2` (the visible ones form a dense map) or `none`.
    headline: what a method that trains the class token has trained: that, the mean of the patch tokens, or (None)
        the model's own pooled feature.
    has_sequence: whether class and patch tokens go through all blocks in one sequence (`Features.states`).
    naflex: "module" whose `why_not`, `recipe_of` and `state_of` tell when and how timm's NaFlexViT takes an encoder of
        images at their own shape; None: never, and `why_not_naflex` says what that does otherwise.
    timm_recipe: from (config, image size, channels) to the arguments of `timm.create_model` whose model takes the
        weights; None where timm has no such model.
    layouts: of official checkpoints, by name. examples: rows of the table of encoders.
    native: whether it takes images at their own shape, as it is set.
    why_not_placeless: why its tokens can't be kept from knowing their places (`Mask.placeless`); None: they can.
    survey: "module" whose `survey` and `why_not_size` tell what shows only once an encoder is built (see timm/).
    label: what an encoder is called in messages.
    check_batch: raises ValueError for a micro-batch of so many rows, of a configuration with such an encoder.
    metrics: of those that it tells beside the method's (`side_losses.py`), what is shown of them.
    """

    name: str
    title: str
    description: str
    config: type
    build: str
    drop_layout: Literal["any", "one_in_2x2", "none"]
    headline: Callable[[Any], Literal["class", "mean"] | None] = lambda config: "mean"
    has_sequence: Callable[[Any], bool] = lambda config: False
    timm_recipe: Callable[[Any, tuple[int, int], int], dict[str, Any] | None] = lambda *settings: None
    naflex: str | None = None
    why_not_naflex: str = "is of another architecture"
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    examples: tuple[Example, ...] = (Example(),)
    native: Callable[[Any], bool] = lambda config: False
    why_not_placeless: Callable[[Any], str | None] = lambda config: "its tokens know their places"
    survey: str | None = None
    label: Callable[[Any], str] = lambda config: config.family
    check_batch: Callable[[Config, int], None] = lambda config, rows: None
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = get_args(get_type_hints(self.config).get("family")) if is_dataclass(self.config) else ()
        if names != (self.name,):
            raise ValueError(f"the section of encoder {self.name} needs family: Literal[{self.name!r}] = {self.name!r}")

    def survey_of(self, config: Any, image_size: tuple[int, int] | None, channels: int | None) -> Any:
        """What an encoder does with images of one size, of a family with a `survey`; ValueError where it can't."""
        return resolve_name(f"{self.survey}:survey")(config, image_size, channels)

    def why_not_size(self, config: Any, built_for: tuple[int, int], channels: int, size: tuple[int, int]) -> str | None:
        """Why an encoder built for images of one size does not take those of another; None where it does."""
        return resolve_name(f"{self.survey}:why_not_size")(config, built_for, channels, size) if self.survey else None
