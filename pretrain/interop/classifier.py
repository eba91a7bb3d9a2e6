"""Classifiers for use elsewhere: encoder and head as timm or ONNX have them, opened again, their outputs compared."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from safetensors.torch import load_file, save
from torch import Tensor, nn

from data_pipelines.files import staged
from pretrain.encoders.saved import timm_recipe
from pretrain.interop.export import NUM_IMAGES, TOLERANCES, Exported, Format, check_out
from pretrain.interop.onnx_graph import run_onnx, write_graph
from pretrain.methods.finetune.saved import Classifier, is_classifier, load_classifier

__all__ = ["FORMATS", "export_classifier", "is_classifier"]
FORMATS = ("timm", "onnx")
HEAD_KEY = "selfsight_head"  # of the header, and of the graph's metadata
#: What timm's models call the norm after the mean, of those that have the choice.
_POOLED_NORM = ("fc_norm", "use_fc_norm")


#: What the outputs are, by task.
_OUTPUTS = {
    "one_label": "(b, classes) logits, shares by softmax",
    "several_labels": "(b, classes) logits, each a share by sigmoid",
    "numbers": "(b, numbers) in the units of the labels",
    "segmentation": "(b, classes, h, w) logits of each pixel, its class by argmax over classes",
}


class OfPixels(nn.Module):
    """Images (b, c, h, w) in 0 .. 1, not normalised, to a classifier's outputs, in a tuple."""

    names = ("logits",)

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        card = classifier.card
        self.register_buffer("mean", rearrange(torch.tensor(card.mean), "c -> c 1 1"))
        self.register_buffer("std", rearrange(torch.tensor(card.std), "c -> c 1 1"))

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.classifier((images - self.mean) / self.std),)


def export_classifier(source: Path, out: Path, to: str, overwrite: bool = False) -> Exported:
    """Write the classifier in the encoder folder `source` to `out`, and compare what is read back on random images.

    Args:
        source: Of a fine-tuned run: its `encoder/` or `best/`.
        out: One file. timm: a state dict that `timm.create_model(..., num_classes=N)` loads strictly, the arguments in
            its header. onnx: a graph from images in 0 .. 1 to logits (of numbers, to the numbers).

    Raises as `export_encoder` does; ValueError where there is no head.
    """
    if not is_classifier(source):
        raise ValueError(
            f"{source} has no head: it is of a run that learned without labels. Leave --head out, or fine-tune it"
        )
    if to not in FORMATS:
        raise ValueError(f"--to is {to!r}; a classifier can be exported to {' and '.join(FORMATS)}; or add --no-head")
    kind = check_out(source, out, to, overwrite)
    classifier = load_classifier(source)
    about = {HEAD_KEY: json.dumps(asdict(classifier.head_card))}
    recipe = _recipe(classifier) if kind == "timm" else {}
    with staged(out, overwrite) as path:
        if kind == "onnx":
            write_graph(path, OfPixels(classifier), OfPixels.names, classifier.card, about)
        else:
            path.write_bytes(save(_timm_state(classifier, recipe), metadata={"timm": json.dumps(recipe), **about}))
        difference = _difference(path, kind, recipe, classifier)
        num_bytes = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
    return Exported(out, num_bytes, difference, TOLERANCES[kind], _usage(out, kind, recipe, classifier))


def task_of(source: Path) -> str:
    """What the head in an encoder folder was trained for."""
    return load_classifier(source).head_card.task


def _recipe(classifier: Classifier) -> dict[str, Any]:
    """Arguments of `timm.create_model`; ValueError where timm has no such model, or none with such a head."""
    recipe, head = timm_recipe(classifier.card), classifier.head_card
    other = "Try instead --to onnx OUT.onnx, which any ONNX runtime opens"
    if recipe is None:
        raise ValueError(f"timm {timm.__version__} has no model that takes these weights. {other}")
    recipe |= {"num_classes": len(head.classes)}
    if head.task == "segmentation":
        raise ValueError(f"timm's models give a class for an image, not for a pixel. {other}")
    if "global_pool" in recipe and (head.pool is not None or head.fc_norm):
        recipe["global_pool"] = "token" if head.pool == "class" else "avg"
    if head.fc_norm:
        named = next((name for name in _POOLED_NORM if name in recipe), None)
        if named is None:
            raise ValueError(f"timm's {recipe['model_name']} has no norm after the mean. {other}")
        recipe[named] = True
    return recipe


def _timm_state(classifier: Classifier, recipe: dict[str, Any]) -> dict[str, Tensor]:
    """The classifier's weights by timm's names."""
    state = dict(classifier.encoder.inner().state_dict())
    if classifier.head_card.fc_norm:
        state = {f"fc_{key}" if key.startswith("norm.") else key: value for key, value in state.items()}
    weight, bias = classifier.head.fc.weight, classifier.head.fc.bias
    if classifier.head_card.target_std:  # timm's models give numbers as they were labelled
        weight = weight * rearrange(classifier.target_std, "k -> k 1")
        bias = bias * classifier.target_std + classifier.target_mean
    for name in _head_names(timm.create_model(**recipe)):
        state |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return {key: value.detach().float().contiguous().clone() for key, value in state.items()}


def _head_names(model: nn.Module) -> list[str]:
    """How a timm model calls its last linear layer, or both of a distilled one."""
    found = model.get_classifier()
    heads = found if isinstance(found, tuple) else (found,)
    names = {id(part): name for name, part in model.named_modules()}
    return [names[id(head)] for head in heads]


@torch.no_grad()
def _difference(path: Path, kind: Format, recipe: dict[str, Any], classifier: Classifier) -> float:
    """The largest difference of any output over some random images, relative to the largest where that is above 1."""
    card = classifier.card
    images = torch.rand(NUM_IMAGES, card.channels, *card.image_size, generator=torch.Generator().manual_seed(0))
    wanted = OfPixels(classifier)(images)[0]
    if kind == "onnx":
        found = run_onnx(path, images)["logits"]
    else:
        model = timm.create_model(**recipe).eval()
        try:
            model.load_state_dict(load_file(path), strict=True)
        except RuntimeError as error:
            told = " ".join(str(error).split())[:300]
            raise ValueError(f"timm's model does not take these weights ({told}). Try instead --to onnx") from error
        mean, std = (rearrange(torch.tensor(values), "c -> c 1 1") for values in (card.mean, card.std))
        found = model((images - mean) / std)
    scale = max(1.0, float(wanted.abs().max()))
    difference = float((found - wanted).abs().nan_to_num(torch.inf).max()) / scale
    if not difference <= TOLERANCES[kind]:
        raise ValueError(
            f"the export to {kind} gives other outputs than the classifier: they differ by up to {difference:.2g} "
            f"(allowed {TOLERANCES[kind]:g}), so it was removed"
        )
    return difference


def _usage(out: Path, kind: Format, recipe: dict[str, Any], classifier: Classifier) -> str:
    """A few lines of Python that use the export."""
    card, head = classifier.card, classifier.head_card
    shape = f"(b, {card.channels}, {card.image_size[0]}, {card.image_size[1]})"
    first = f"{_OUTPUTS[head.task]}: {', '.join(head.classes[:5])}{', ...' if len(head.classes) > 5 else ''}"
    if kind == "onnx":
        return (
            "import onnxruntime\n"
            f"session = onnxruntime.InferenceSession({str(out)!r})\n"
            f'[outputs] = session.run(["logits"], {{"images": images}})  '
            f"# float32 {shape}: pixels in 0 .. 1, not normalised; {first}"
        )
    mean, std = (tuple(round(value, 6) for value in values) for values in (card.mean, card.std))
    arguments = [f"{key}={value!r}" for key, value in recipe.items() if key != "model_name" and value is not None]
    arguments = [repr(recipe["model_name"]), *arguments, f"checkpoint_path={str(out)!r}"]
    return (
        f"import timm\nmodel = timm.create_model({', '.join(arguments)}).eval()\n"
        f"outputs = model(images)  # {shape}: of pixels in 0 .. 1, minus mean {mean}, by std {std}; {first}"
    )
