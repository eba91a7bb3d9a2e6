"""Selfsight in Python: from images to a pretrained encoder, its features and how good they are.

    import selfsight

    run = selfsight.pretrain(data="photos/", val_share=0.1)
    encoder = run.load()                      # or selfsight.load("runs/photos"), "timm:NAME", an export, an import
    features = encoder.embed("photos/")       # features.values (n, d), features.keys, features.labels
    print(selfsight.probe("runs/photos", "photos/", val_share=0.1))

Images are whatever `selfsight pack` takes: a folder, a CSV of paths, DICOM files, tables. Importing this imports
nothing heavy; torch comes with the first call that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .features import Embedding
    from .model import Model, load
    from .probing import ProbeResults, probe
    from .run import Run, pretrain

__all__ = ["Embedding", "Model", "ProbeResults", "Run", "load", "pretrain", "probe"]
_HOME = {
    "Embedding": "features",
    "Model": "model",
    "ProbeResults": "probing",
    "Run": "run",
    "load": "model",
    "pretrain": "run",
    "probe": "probing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"selfsight has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
