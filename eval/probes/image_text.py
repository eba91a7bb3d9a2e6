"""Image-text retrieval: is an image's own caption among the nearest, and the image among the nearest to its caption?

Of encoders that learned from captions, on val's images and captions. Captions that are the same, word by word, are one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.base import Column, ProbeSpec, Scores, Store
from eval.outcomes import Outcome, scored

RECALL_AT = (1, 5, 10)
#: Similarities that are held at once: 64 MiB of fp32.
_AT_ONCE = 2**24


@dataclass(frozen=True)
class ImageTextSettings:
    """How many val images are compared: all, with `full`; else `most`, drawn by the first seed."""

    full: bool = False
    most: int = 5000


def places(queries: Tensor, others: Tensor, own: list[list[int]]) -> Tensor:
    """(m,) of each query (m, e) the place of the nearest of its `own` among the others (n, e), 0 for the first.

    Of equal similarities those that are not its own come first.
    """
    found = []
    step = max(1, _AT_ONCE // len(others))
    for first in range(0, len(queries), step):
        similar = queries[first : first + step] @ others.T
        for row, mine in zip(similar, own[first : first + step], strict=True):
            best = row[mine].max()
            ahead = int((row >= best).sum()) - int((row[mine] >= best).sum())
            found.append(ahead)
    return torch.tensor(found)


def run(store: Store, settings: ImageTextSettings) -> Scores:
    """Recall at 1, 5 and 10 both ways; nothing for rows without words."""
    if store.text is None or store.captions is None:
        return {}
    side, val = store.text, store.val
    rows = torch.arange(len(val.ids))
    if not settings.full and settings.most < len(rows):
        generator = torch.Generator().manual_seed(store.seeds[0])
        rows = rows[torch.randperm(len(rows), generator=generator)[: settings.most]].sort().values
    store.progress(f"image-text: {len(rows):,} images and their captions")
    captions = [store.captions(sample) for sample in val.ids[rows].tolist()]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(text for each in captions for text in each))}
    of_image = [sorted({numbers[text] for text in each}) for each in captions]
    of_text: list[list[int]] = [[] for _ in numbers]
    for image, each in enumerate(of_image):
        for text in each:
            of_text[text].append(image)
    images = side.of_images(val.inputs[val.pooled_as][rows]).cpu()
    texts = side.of_texts(list(numbers)).cpu()
    to_text, to_image = places(images, texts, of_image), places(texts, images, of_text)
    groups = None if val.groups is None else val.groups[rows]

    def told(hits: Tensor) -> Scores:
        return scored(Outcome("mean", hits.float(), rows=rows), groups=groups)

    of_its_captions = {k: (to_image < k).float() for k in RECALL_AT}
    return {
        "images": len(rows),
        "of": len(val.ids),
        "captions": len(numbers),
        "to_text": {str(k): told(to_text < k) for k in RECALL_AT},
        "to_image": {
            str(k): told(torch.stack([hits[each].mean() for each in of_image])) for k, hits in of_its_captions.items()
        },
        "blind": sum(map(len, of_image)) / len(of_image) / len(numbers),
    }


def columns(result: Scores, headline: str) -> list[Column]:
    """Recall at 1 both ways; those at 5 and 10 beside them for those who look."""
    if not result:
        return []
    found = []
    for way, title in (("to_text", "image to text"), ("to_image", "text to image")):
        for k in result[way]:
            first = k == "1"
            chance = result["blind"] if way == "to_text" and first else None
            found.append(
                Column(f"{way}_{k}", f"{title} R@{k}", ((way, k),), first and way == "to_text", "value", chance=chance,
                       more=not first)
            )  # fmt: skip
    return found


def notes(result: Scores, settings: ImageTextSettings) -> list[str]:
    """What was compared."""
    if not result:
        return []
    which = "all" if result["images"] == result["of"] else f"{result['images']:,} of {result['of']:,}"
    return [
        f"image-text: {which} held-out images and their {result['captions']:,} different captions; R@k: one's own is "
        "among the k nearest"
    ]


SPEC = ProbeSpec("image_text", run, columns, ImageTextSettings, needs="text", labels="none", notes=notes, native=True)
