"""Zero-shot classification (Radford et al. 2021): is an image's class the one whose name is nearest to it?

Of encoders that learned from captions. Nothing is learned from train.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.base import Column, ProbeSpec, Scores, Store, TextSide
from eval.outcomes import with_right
from eval.words import TEMPLATES


@dataclass(frozen=True)
class ZeroShotSettings:
    """templates: sentences with {} for the name of a class; their embeddings are averaged. names: words for classes,
    in pairs, where those of the data are none."""

    templates: tuple[str, ...] = TEMPLATES
    names: tuple[tuple[str, str], ...] = ()


def class_embeddings(side: TextSide, names: list[str], templates: tuple[str, ...]) -> Tensor:
    """(c, e) of length 1, the mean over the templates of each class's embeddings."""
    texts = [template.replace("{}", name) for name in names for template in templates]
    return F.normalize(side.of_texts(texts).view(len(names), len(templates), -1).mean(dim=1), dim=1)


def run(store: Store, settings: ZeroShotSettings) -> Scores:
    """Top-1 and top-5 of val's images; nothing for rows without words."""
    if store.text is None:
        return {}
    side, val = store.text, store.val
    words = dict(settings.names)
    names = [words.get(name, name) for name in store.class_names]
    store.progress(f"zero-shot: {len(val.labels):,} images among {len(names):,} classes")
    similar = (side.of_images(val.inputs[val.pooled_as]) @ class_embeddings(side, names, settings.templates).T).cpu()
    right = similar.argmax(dim=1) == val.labels
    shares: Scores = {"top1": float(right.float().mean())}
    if len(names) > 5:
        near = (similar.topk(5, dim=1).indices == val.labels[:, None]).any(dim=1)
        shares["top5"] = float(near.float().mean())
    recall = {
        names[label]: float(right[val.labels == label].float().mean()) for label in torch.unique(val.labels).tolist()
    }
    return {**with_right(shares, right, val.groups), "templates": len(settings.templates), "recall": recall}


def columns(result: Scores, headline: str) -> list[Column]:
    """Top-1."""
    return [Column("zero_shot", "zero-shot")] if result else []


def notes(result: Scores, settings: ZeroShotSettings) -> list[str]:
    """What was asked."""
    if not result:
        return []
    shown = "; ".join(settings.templates[:3]) + ("; ..." if len(settings.templates) > 3 else "")
    return [
        f"zero-shot: the class whose name is nearest, in the mean of {result['templates']} sentences ({shown}); "
        "nothing was learned from train"
    ]


SPEC = ProbeSpec(
    "zero_shot", run, columns, ZeroShotSettings, needs="text", labels=("class", "grade"), notes=notes, native=True
)
