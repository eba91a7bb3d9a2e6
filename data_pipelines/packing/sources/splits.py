"""Which split images belong to, and which class, by the names of folders and files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from data_pipelines.images.issues import shown
from data_pipelines.packing.listing import Membership

#: What is called how, in any case.
_SYNONYMS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
    "unlabeled": ("unlabeled", "unlabelled", "unsup", "unsupervised"),
    "extra": ("extra",),
}
_KIND_OF_WORD = {word: kind for kind, words in _SYNONYMS.items() for word in words}
#: The kinds that are training data under a name of their own.
AS_TRAIN = ("unlabeled", "extra")
_FILLERS = frozenset(("image", "images", "img", "imgs", "photos", "pictures", "data", "dataset", "set", "split"))
_WORDS = re.compile(r"[\W_]+")
_WITHIN = re.compile(r"(?<=[a-z])(?=[A-Z][a-z])")  # of TrainImages
_NUMBERED = re.compile(r"(?<=[a-z])\d+$")  # train2017 of COCO, test1
_YEAR = re.compile(r"(?<=[a-z])(19|20)\d\d$")
_PART = re.compile(r"(.+?)[-_.]\d+(-of-\d+)?")  # train-000000, train-00000-of-00010
_MAX_TOLD = 5


def _told(name: str, number: re.Pattern[str] = _YEAR) -> tuple[str | None, tuple[str, ...]]:
    """The kind of split that the words of a name tell, if it is one, and its words beside that and those that say
    nothing; `number` is what may follow a word."""
    words = [number.sub("", word) for word in _WORDS.split(_WITHIN.sub(" ", name).lower()) if word]
    words = [word.removesuffix("set") if len(word) > 3 else word for word in words]
    kinds = {_KIND_OF_WORD[word] for word in words if word in _KIND_OF_WORD}
    if kinds & set(AS_TRAIN):
        kinds.discard("train")  # train_extra
    others = tuple(word for word in words if word not in _FILLERS and word not in _KIND_OF_WORD)
    return kinds.pop() if len(kinds) == 1 else None, others


def split_kind(name: str) -> str | None:
    """train, val, test, unlabeled or extra, where a folder's name says nothing but that; None for other names.

    In any case, with the usual synonyms, and with words such as `images`, `set` or a year beside: `Training`,
    `trainset`, `val_images`, `train2017`.
    """
    kind, others = _told(name)
    return None if others else kind


def membership(kind: str | None, label: str | int | None, group: str | None = None) -> Membership:
    """Of a split by its kind or name: what is unlabeled or extra is trained on, what is unlabeled without labels."""
    return Membership("train" if kind in AS_TRAIN else kind, None if kind == "unlabeled" else label, group)


def split_of(file: str) -> str | None:
    """The split that a file's path names: a folder on the way as `split_kind` knows it, a word of the file's own name
    that is one of a split's (cifar10-train), or else this name up to its number."""
    *folders, name = file.split("/")
    stem = name.partition(".")[0]
    numbered = _PART.fullmatch(stem)
    own = numbered[1] if numbered else stem
    told = (*map(split_kind, folders), _told(own, _NUMBERED)[0], own if numbered else None)
    return next(filter(None, told), None)


def splits_of_files(files: Sequence[str]) -> tuple[list[str | None], list[str]]:
    """The split of each file, by its kind or by its name, and notes on them; None where the names do not tell splits.

    Raises:
        ValueError: Some files are train's, and of others it is not known.
    """
    found = [split_of(file) for file in files]
    if "train" in found:
        unknown = [file for file, split in zip(files, found, strict=True) if split is None]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(files)} files belong to no split, the first of them {unknown[0]}; name them "
                "as train-00000, or pack them by themselves"
            )
        return found, []
    kinds = [split if split in _SYNONYMS else None for split in found]
    rest = [file for file, kind in zip(files, kinds, strict=True) if kind is None]
    if not rest or not {"val", "test"} & set(kinds):
        return kinds, []
    held = next(file for file, kind in zip(files, kinds, strict=True) if kind in ("val", "test"))
    return kinds, [
        f"of {len(files)} files the names of {len(files) - len(rest)} tell a split, such as {shown(held)}; the others, "
        f"such as {shown(rest[0])}, are train's (or of --split)"
    ]


def memberships_of_folders(
    folders: Iterable[str], labels: bool = True, split_folders: bool = True
) -> tuple[list[Membership], list[str]]:
    """Splits and classes of images from the folders they lie in (with forward slashes, "" for none), and notes on them.

    A folder that holds all the others is passed over. If what lies below has the names of splits (`split_kind`), each
    is one, unlabeled and extra images being train's; else nothing is. Names that differ in that alone are splits too
    (seg_train, seg_test). Below that, the first-level folder is the class, unless `labels` is False; what holds all of
    a split, and is called as the split or as images are, is passed over (train/train/cat, train/images/cat). Classes
    that hold the splits (cat/train, cat/val) are understood too.

    Args:
        folders: One for each membership.
        labels: Whether folders are classes.
        split_folders: False: a folder of a split's name is a class as any other.

    Raises:
        ValueError: Folders of splits lie beside others, so that nobody knows whether those are classes; two folders are
            one split; or images of one split lie both in and beside class folders.
    """
    parts = [folder.split("/") if folder else [] for folder in folders]
    outer = _num_outer(parts, split_folders)
    parts = [part[outer:] for part in parts]
    names = sorted({part[0] if part else "" for part in parts})
    kinds = _kinds(names) if split_folders else dict.fromkeys(names)
    named = [name for name in names if kinds[name]]
    if not named and split_folders and _splits_lie_deeper(parts):
        return _classes_that_hold_splits(parts, labels)
    if len(named) < len(names):
        if any(kinds[name] != "extra" for name in named):
            raise ValueError(_beside(named, [name for name in names if not kinds[name]]))
        named = []
    for kind in _SYNONYMS:
        same = [name for name in named if kinds[name] == kind]
        if len(same) > 1:
            raise ValueError(f"the folders {' and '.join(same)} are both the split {kind}; leave one of them")
    depth = int(bool(named))
    if depth:
        parts = _without_repeats(parts)
    found = [
        membership(kinds[part[0]] if depth else None, part[depth] if labels and len(part) > depth else None)
        for part in parts
    ]
    of_splits: dict[str, list[int]] = {}
    for place, part in enumerate(parts):
        of_splits.setdefault(part[0] if depth else "", []).append(place)
    for name, places in of_splits.items():
        if kinds.get(name) == "unlabeled":
            continue
        loose = [place for place in places if found[place].label is None]
        if labels and loose and len(loose) < len(places):
            where = "/".join(parts[loose[0]]) or "the topmost folder"
            raise ValueError(
                f"images lie beside the class folders, some of them in {where}; move them into a class folder or out "
                "of the tree, or pack without labels (--no-labels)"
            )
    renamed = [f"{name} as {found[of_splits[name][0]].split}" for name in named if name != kinds[name]]
    renamed += [f"{name} as train" for name in named if name == kinds[name] and name in AS_TRAIN]
    notes = [f"split folders are packed under their usual names: {', '.join(renamed)}"] if renamed else []
    return found, notes


def _kinds(names: Sequence[str]) -> dict[str, str | None]:
    """The split's kind of each of the folders that lie side by side."""
    kinds = {name: split_kind(name) for name in names}
    if any(kinds.values()):
        return kinds
    told = {name: _told(name) for name in names}
    named = {kind: others for kind, others in told.values() if kind}
    alike = {others for kind, others in told.values() if kind}
    if len(alike) == 1 and "train" in named and named.keys() & {"val", "test"}:
        return {name: kind for name, (kind, _) in told.items()}
    return kinds


def _without_repeats(parts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Without the folder below a split that holds all of it and says no more than the split does, or `images`."""
    below: dict[str, set[str]] = {}
    for part in parts:
        below.setdefault(part[0], set()).add(part[1] if len(part) > 1 else "")
    repeated = {
        (split, *names)
        for split, names in below.items()
        if len(names) == 1 and "" not in names and all(_told(name) in (_told(split), (None, ())) for name in names)
    }
    return [[part[0], *part[2:]] if tuple(part[:2]) in repeated else [*part] for part in parts]


def _num_outer(parts: Sequence[Sequence[str]], split_folders: bool) -> int:
    """How many folders, one in the other, hold all of these; none of them is a split."""
    most = max(min(map(len, parts), default=0) - 1, 0)
    for depth in range(most):
        names = {part[depth] for part in parts}
        if len(names) > 1 or (split_folders and split_kind(names.pop())):
            return depth
    return most


def _beside(splits: Sequence[str], others: Sequence[str]) -> str:
    more = f" and {len(others) - _MAX_TOLD} more" if len(others) > _MAX_TOLD else ""
    lie = ", ".join(name or "the topmost folder" for name in others[:_MAX_TOLD]) + more
    return (
        f"images lie in {', '.join(splits)}, which {'is a split' if len(splits) == 1 else 'are splits'}, and beside "
        f"in {lie}, of which nobody knows the split. Move these into a split's folder or out of the tree; or, if all "
        "of them are classes, say so (--no-split-folders)"
    )


def _splits_lie_deeper(parts: Sequence[Sequence[str]]) -> bool:
    """Whether both training and held-out images lie in folders of such names below the first level."""
    deepest = max(map(len, parts), default=0)
    for depth in range(1, deepest):
        kinds = {split_kind(part[depth]) for part in parts if len(part) > depth}
        if "train" in kinds and kinds & {"val", "test"}:
            return True
    return False


def _classes_that_hold_splits(parts: Sequence[Sequence[str]], labels: bool) -> tuple[list[Membership], list[str]]:
    if any(len(part) != 2 or not split_kind(part[1]) for part in parts):
        example = next("/".join(part) for part in parts if any(map(split_kind, part)))
        raise ValueError(
            f"folders of splits lie further down, as in {example}, and not as CLASS/train and CLASS/val throughout. "
            f"Pack {parts[0][0] if parts[0] else 'each of the folders above them'} and its like one by one; or, if "
            "they are no splits, say so (--no-split-folders)"
        )
    found = [membership(split_kind(part[1]), part[0] if labels else None) for part in parts]
    return found, ["the classes' folders hold the splits' (CLASS/train), and were read so"]
