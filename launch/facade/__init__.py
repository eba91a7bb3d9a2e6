"""Selfsight in Python: from images to a pretrained encoder, its features and how good they are.

    import selfsight

    run = selfsight.pretrain(data="photos/", val_share=0.1)
    encoder = run.load()                      # or selfsight.load("runs/photos"), "timm:NAME", an export, an import
    features = encoder.embed("photos/")       # features.values (n, d), features.keys, features.labels
    print(selfsight.probe("runs/photos", "photos/", val_share=0.1))
    labelled = selfsight.finetune("runs/photos", "photos/", val_share=0.1)  # the encoder trained on with labels
    maps = selfsight.backbone("runs/photos")  # images to feature maps of strides 4 to 32, for detectors

Images are whatever `selfsight pack` takes: a folder, a CSV of paths, DICOM files, tables. Importing this imports
nothing heavy; torch comes with the first call that needs it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbones import backbone
    from .features import Embedding
    from .model import Model, load
    from .probing import ProbeResults, probe
    from .run import Run, finetune, pretrain

__all__ = ["Embedding", "Model", "ProbeResults", "Run", "backbone", "finetune", "load", "pretrain", "probe"]
_HOME = {
    "Embedding": "features",
    "Model": "model",
    "ProbeResults": "probing",
    "Run": "run",
    "backbone": "backbones",
    "finetune": "run",
    "load": "model",
    "pretrain": "run",
    "probe": "probing",
}


def _claim_packages() -> None:
    """Import our own packages from beside this one: an `eval.py` or `pretrain.py` beside the user's script is found
    first otherwise. Raises ImportError where one of those is imported already."""
    near = Path(__file__).parents[1:3]  # of an installed wheel, of a checkout
    root = next(folder for folder in near if (folder / "data_pipelines" / "__init__.py").is_file())
    for name in ("data_pipelines", "eval", "launch", "pretrain"):
        known = sys.modules.get(name)
        if known is None:
            place = root / name / "__init__.py"
            spec = spec_from_file_location(name, place, submodule_search_locations=[str(place.parent)])
            assert spec is not None
            assert spec.loader is not None
            sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        elif not Path(str(getattr(known, "__file__", None))).is_relative_to(root):
            raise ImportError(
                f"{getattr(known, '__file__', name)} is imported as {name}, and Selfsight has a package of that name: "
                "call yours otherwise, or import selfsight before it"
            )


_claim_packages()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"selfsight has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
