"""An encoder as an ONNX graph, and what that graph computes (packages of the extra `onnx`)."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretrain.encoders import Encoder
from pretrain.encoders.saved import CARD_KEY, EncoderCard

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT = "images"


class WholeImages(nn.Module):
    """Images (b, c, h, w) in 0 .. 1, not normalised, to what an encoder makes of them.

    names: of the outputs, in order: pooled (b, d), tokens (b, n, d) and, where the encoder has it, class (b, d).
    """

    def __init__(self, encoder: Encoder, card: EncoderCard) -> None:
        super().__init__()
        self.encoder = encoder
        frames = card.planes // card.channels
        self.register_buffer("mean", repeat(torch.tensor(card.mean), "c -> (t c) 1 1", t=frames))
        self.register_buffer("std", repeat(torch.tensor(card.std), "c -> (t c) 1 1", t=frames))
        with torch.no_grad():
            shown = encoder(torch.zeros(1, card.planes, *card.image_size))
        has_class = encoder.has_class_token and shown.prefix_tokens is not None
        self.names = ("pooled", "tokens", "class") if has_class else ("pooled", "tokens")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.encoder((images - self.mean) / self.std)
        outputs = (features.pooled, features.tokens)
        return (*outputs, features.prefix_tokens[:, 0]) if "class" in self.names else outputs


def check_packages() -> None:
    """Raises ValueError, naming the command, where the extra `onnx` is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"an export to ONNX needs {', '.join(missing)}, which this installation lacks: "
            "pip install --constraint constraints.txt '.[onnx]' in the checkout of selfsight"
        )


def write_onnx(path: Path, encoder: Encoder, card: EncoderCard, native: bool = False) -> None:
    """Write the graph to `path`; weights beyond ONNX's 2 GB go to `path`.data. The batch may have any size; of a
    `native` graph it is one image, whose sides are any multiples of the patch.

    What training alone keeps apart is merged (`Encoder.merged`). The graph normalises the images itself. Its metadata
    hold the card, mean, std and the range of the images.
    """
    model = WholeImages(encoder.merged(), card)
    about = {CARD_KEY: TypeAdapter(EncoderCard).dump_json(card).decode()}
    write_graph(path, model, model.names, card, about, encoder.patch if native else None)


def write_graph(
    path: Path,
    model: nn.Module,
    names: tuple[str, ...],
    card: EncoderCard,
    about: dict[str, str],
    multiples: int | None = None,
) -> None:
    """Write a module of images (b, c, h, w) in 0 .. 1 to a tuple of outputs called `names`, which are its rows'.

    about: metadata beside mean, std and the range of the images. multiples: of one image (1, c, h, w), whose sides are
    any multiples of so many px.
    """
    model.eval()
    # of two images: torch would take a batch of one for a constant
    example = torch.zeros(2, card.planes, *card.image_size)
    sizes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if multiples is not None:
        example = torch.zeros(1, card.planes, 3 * multiples, 5 * multiples)
        sizes = {axis: multiples * torch.export.Dim(name) for axis, name in ((2, "rows"), (3, "columns"))}
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        # the fused kernels lay attention out in memory as the exporter's own formula does not
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), _written_out(model):
            warnings.simplefilter("ignore")  # torch's notes to itself about names and tracing
            program = torch.onnx.export(
                model,
                (example,),
                input_names=[INPUT],
                output_names=list(names),
                dynamic_shapes=(sizes,),
                dynamo=True,
                verbose=False,
            )
    finally:
        log.setLevel(level)
    assert program is not None
    described: dict[str, Any] = {
        **about,
        "image_range": "0 .. 1; the graph subtracts mean and divides by std itself",
        "mean": json.dumps(card.mean),
        "std": json.dumps(card.std),
    }
    for value in program.model.graph.all_nodes():
        value.metadata_props.clear()  # stack traces, with paths of this machine
    program.model.metadata_props.update(described)
    program.save(str(path))


@contextmanager
def _written_out(model: nn.Module) -> Iterator[None]:
    """While it lasts, timm's attention is products and a softmax: the exporter knows the fused form of 4 axes only."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def run_onnx(path: Path, images: Tensor) -> dict[str, Tensor]:
    """The outputs by name for `images` (b, c, h, w) in 0 .. 1, by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, {INPUT: images.numpy()})), strict=True))
