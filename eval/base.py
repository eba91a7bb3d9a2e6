"""The seam of probes: what a probe is given, what it says of itself and of its numbers (imports no torch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Scores = dict[str, Any]  # plain JSON values, and an `Outcome` in what `eval.outcomes.scored` made
#: What is known of an image. class: one of several; several: any number of them; number: to be predicted as such;
#: grade: a class, and classes have an order, as stages of an illness.
LabelKind = Literal["class", "several", "number", "grade"]
Unit = Literal["percent", "number"]


class Tokens(Protocol):
    """The patch tokens of n images, read where they lie: a file that is mapped, or memory.

    grid: (rows, columns) of them on the image. dim: of a token.
    """

    grid: tuple[int, int]
    dim: int

    def __len__(self) -> int:
        """n."""
        ...

    def __getitem__(self, rows: Tensor) -> Tensor:
        """(b, t, d) float32 of the images `rows` (b,), t = grid rows x columns, row by row."""
        ...


@runtime_checkable
class NativeTokens(Protocol):
    """`Tokens` of n images at their own shape.

    grids: (n, 2) int64 rows and columns of each image's tokens. dim: of a token.
    """

    grids: Tensor
    dim: int

    def __len__(self) -> int:
        """n."""
        ...

    def images(self, rows: Tensor) -> list[Tensor]:
        """(t_i, d) float32 of each of the images `rows` (b,), row by row."""
        ...


class Masks(Protocol):
    """What is to be predicted at each pixel of n images, cropped as they are; read when it is asked for.

    rows: (m,) int64, ascending: the images of which there is something; no others can be asked for.
    """

    rows: Tensor

    def __getitem__(self, rows: Tensor) -> Tensor:
        """(b, h, w) of the images `rows` (b,): int64 classes with `IGNORED` where nothing is known, or float32 numbers
        with NaN there."""
        ...


@runtime_checkable
class NativeMasks(Protocol):
    """`Masks` of n images at their own shape."""

    rows: Tensor

    def images(self, rows: Tensor) -> list[Tensor]:
        """(h_i, w_i) of each of the images `rows` (b,), as of `Masks`."""
        ...


IGNORED = -1  # in a mask: not of any class, left out of training and of every number


@dataclass(frozen=True)
class FeatureSet:
    """Features of n labelled images.

    inputs: by name, (n, d) float32, each with its d; what a probe may read. They are views of one matrix, so the
        combinations cost no memory. With a class token: `class`, `mean` (of the patch tokens), `class + mean`,
        `class of last 4`, `class of last 4 + mean`; without: `mean`, `mean of last 4`. `pooled` where the model
        gives its own classifier something else.
    pooled_as: the name of the input that is the model's own pooled feature.
    labels: of kind class and grade (n,) int64, of several (n, classes) float32 of 0 and 1, of number (n,) float32;
        empty where nobody asked for labels.
    ids: (n,) int64 sample numbers, in order; a data set's `key` tells each one's name.
    digests: (n,) int64, equal where the images are, as they are cropped.
    groups: (n,) int64, equal where samples belong together, such as images of one patient; in train and in val there
        are no equal ones. None where nobody asked for groups.
    keys: the samples' names in the data set, n of them; empty where there is none.
    tokens: of patches, where a probe needs them. masks: classes of pixels, and depths: numbers, where a probe needs
        them.
    """

    inputs: dict[str, Tensor]
    pooled_as: str
    labels: Tensor
    ids: Tensor
    digests: Tensor
    groups: Tensor | None = None
    keys: Sequence[str] = ()
    tokens: Tokens | NativeTokens | None = None
    masks: Masks | NativeMasks | None = None
    depths: Masks | NativeMasks | None = None


#: Changes crops before they are normalised: images (b, c, h, w), uint8 or uint16, sample numbers (b,) -> such images.
Change = Callable[["Tensor", "Tensor"], "Tensor"]


class Again(Protocol):
    """The features of images that are changed before they are encoded."""

    def __call__(self, change: Change, of_train: bool, samples: Tensor | None = None) -> FeatureSet:
        """Of all of train, or of val; or of these sample numbers (m,) int64 only, which ascend."""
        ...


def unchanged(change: Change, of_train: bool, samples: Tensor | None = None) -> FeatureSet:
    """For a store that has features only."""
    raise ValueError("this store holds features and no images, so that nothing can be changed in these")


class Painted(NamedTuple):
    """What a probe says of the pixels of some val images, for people to look at.

    rows: (m,) int64, the places of the images among val's. maps: by what they are, m of (h, w) int64 levels of masks,
    with `IGNORED`. words: a line on each of them.
    """

    rows: Tensor
    maps: Mapping[str, Sequence[Tensor]]
    words: Mapping[str, Sequence[str]]


class TextSide(Protocol):
    """What learned beside an encoder to compare its images with words."""

    def of_images(self, pooled: Tensor) -> Tensor:
        """(n, e) of length 1, of the encoder's own pooled features (n, d)."""
        ...

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """(n, e) of length 1."""
        ...


@dataclass(frozen=True)
class Store:
    """What a probe is given: the frozen features of one row of the table (an encoder, or a baseline), once for all.

    train, val: labels of classes lie in 0 .. num_classes - 1, whatever the data set calls them. What only val has is
        among the classes too.
    num_classes: 0 for numbers.
    kind: of the labels; class_names: of each class, in order, where labels are classes.
    again: the features of train's or val's images, or of some of them, changed before they are encoded: corrupted,
        turned, another crop. For probes that need the encoder.
    headline: the input that a probe of a single feature reads.
    seeds: one repetition each, where a probe draws anything; the first makes what is drawn once.
    device: where to compute; features lie in the CPU's memory.
    progress: is told what runs.
    mask_names: of the levels of masks, where the data set has any.
    show: takes what is to be looked at, by the name of the probe; None where nobody looks, as at baselines.
    text: of the row's encoder, where it learned from captions. captions: of a val sample by its number, for probes that
        need them.
    """

    train: FeatureSet
    val: FeatureSet
    num_classes: int
    headline: str
    seeds: Sequence[int] = (0,)
    device: str = "cpu"
    progress: Callable[[str], None] = lambda what: None
    kind: LabelKind = "class"
    class_names: Sequence[str] = ()
    again: Again = unchanged
    mask_names: Mapping[int, str] = field(default_factory=dict)
    show: Callable[[str, Painted], None] | None = None
    text: TextSide | None = None
    captions: Callable[[int], Sequence[str]] | None = None


class Column(NamedTuple):
    """A number of a probe that tables, the report, wandb and the model card show.

    name: in wandb, as `probe/NAME`. title: above its column.
    paths: where its score lies in the probe's result; of several, the first that a row has. A score has its number,
        `standard_error` and `interval`, see `eval.scores.with_error` and `eval.outcomes.scored`.
    headline: the one that stands for the probe where there is room for one.
    key: of the number in the score.
    unit: percent, for a number of 0 .. 1 that is shown as such; or a number as it is.
    chance: what is reached blindly: `most_frequent`, the share of the most frequent class; a number; None where there
        is no such thing.
    lower_is_better: as of an error.
    more: stands below the table, with the notes, and in a table of its own in the report: for what not all look at.
    """

    name: str
    title: str
    paths: tuple[tuple[str, ...], ...] = ((),)
    headline: bool = True
    key: str = "top1"
    unit: Unit = "percent"
    chance: float | Literal["most_frequent"] | None = "most_frequent"
    lower_is_better: bool = False
    more: bool = False


def no_notes(result: Scores, settings: Any) -> list[str]:
    """For a probe that has nothing to add to its numbers."""
    return []


@dataclass(frozen=True)
class ProbeSpec:
    """A probe. The same `run` measures the encoder and every baseline beside it.

    name: key of its result and of its settings; as `--also NAME` on the command line.
    run: (store, settings) -> its result, plain JSON values. Whatever it chooses, it chooses on train.
    columns: (result of the pretrained row, headline input) -> what is shown of it.
    settings: a frozen dataclass with defaults for everything. They are part of every result and of the key under which
        baselines are kept. `epochs` and `full` are set by the options of that name.
    needs: what it reads.
    labels: which kinds of them it takes; `mask` and `depth`: what lies at each pixel, whatever the images' labels are;
        `none`: any, or no labels at all.
    notes: (result of the pretrained row, settings) -> lines below the table.
    always: it runs unasked, on labels that it takes.
    native: of one that reads tokens or the encoder, whether it takes images at their own shape, too.
    costly: it takes minutes where others take seconds, so that it runs only where it is named.
    """

    name: str
    run: Callable[[Store, Any], Scores]
    columns: Callable[[Scores, str], Sequence[Column]]
    settings: type
    needs: Literal["pooled", "tokens", "encoder", "text"] = "pooled"
    labels: LabelKind | Literal["mask", "depth", "none"] | tuple[LabelKind, ...] = "class"
    notes: Callable[[Scores, Any], Sequence[str]] = no_notes
    always: bool = False
    native: bool = False
    costly: bool = False

    def takes(self, kind: LabelKind) -> bool:
        """Whether it runs on labels of that kind."""
        return self.labels in ("mask", "depth", "none") or kind in (
            (self.labels,) if isinstance(self.labels, str) else self.labels
        )

    def configured(self, options: Mapping[str, Any]) -> Any:
        """Its settings with those of the `options` that it has."""
        return self.settings(**{f.name: options[f.name] for f in fields(self.settings) if f.name in options})

    def described(self, result: Scores, settings: Any, headline: str) -> tuple[list[dict[str, Any]], list[str]]:
        """Columns and notes as JSON values, so that a result is read without the probe that made it."""
        of_none = {"label_free": True} if self.labels == "none" else {}
        columns = [{"probe": self.name, **column._asdict(), **of_none} for column in self.columns(result, headline)]
        return columns, list(self.notes(result, settings))


@dataclass(frozen=True)
class NoSettings:
    """Of a probe that has none."""
