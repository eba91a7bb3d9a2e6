"""Encoders against files recorded from the authors' own implementations, through our importer: outputs, and gradients
where our features have all that the recorded loss reads (of HorNet, Shunted and TimeSformer they do not).

The files are not part of this repository. `SELFSIGHT_PARITY=FOLDER pytest tests/parity` runs the comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from parity_files import everything, gradients_as_state, imported, recorded, relative_error
from torch import Tensor
from torch.nn import functional as F

from pretrain.encoders.base import Encoder, Features, Mask
from pretrain.encoders.native import PackedImages
from pretrain.encoders.patches import patchify

Record = dict[str, Any]
Outputs = dict[str, Tensor]


def classified(features: Features, record: Record, head: str = "head") -> Tensor:
    state = record["state_dict"]
    return F.linear(features.pooled, state[f"{head}.weight"], state[f"{head}.bias"])


def as_map(features: Features) -> Tensor:
    assert features.grid is not None
    return rearrange(features.tokens, "b (h w) d -> b d h w", h=features.grid[0])


def token_mask(record: Record, patch: int) -> Mask | None:
    if "masks" not in record["inputs"]:
        return None
    height = record["inputs"]["x"].shape[2] // patch
    return Mask(token=rearrange(record["inputs"]["masks"].bool(), "b (h w) -> b h w", h=height))


def hornet(encoder: Encoder, record: Record) -> Outputs:
    ends = tuple(end - 1 for end in torch.tensor(record["config"]["depths"]).cumsum(0).tolist())
    features = encoder(record["inputs"]["x"], layers=ends)
    stages = {f"stage{number}": as_map(layer) for number, layer in enumerate(features.layers[:-1])}
    # the last of their maps comes before the norm that ours went through
    return {**stages, "pooled": features.pooled, "logits": classified(features, record)}


def shunted(encoder: Encoder, record: Record) -> Outputs:
    features = encoder(record["inputs"]["x"])
    return {"stage3": features.tokens, "logits": classified(features, record)}


def focal(encoder: Encoder, record: Record) -> Outputs:
    features = encoder(record["inputs"]["x"], layers=(0, 1, 2))
    names = ("stage0_block0", "stage0_block1", "stage1_block0")
    blocks = {name: layer.tokens for name, layer in zip(names, features.layers, strict=True)}
    return {**blocks, "tokens": features.tokens, "logits": classified(features, record)}


def tokens_and_logits(encoder: Encoder, record: Record) -> Outputs:
    features = encoder(record["inputs"]["x"])
    return {"tokens": everything(features), "logits": classified(features, record)}


def deepvit(encoder: Encoder, record: Record) -> Outputs:
    features = encoder(record["inputs"]["x"], layers=(0, 1, 2))
    blocks = {f"block{number}": layer.states for number, layer in enumerate(features.layers)}
    return {**blocks, "tokens": everything(features), "logits": classified(features, record)}


def frames(encoder: Encoder, record: Record) -> Outputs:
    clips = rearrange(record["inputs"]["x"], "b c t h w -> b (t c) h w")
    features = encoder(clips)
    assert features.prefix_tokens is not None
    return {"class": features.prefix_tokens[:, 0], "logits": classified(features, record)}


def swin_moe(encoder: Encoder, record: Record) -> Outputs:
    return {"logits": classified(encoder(record["inputs"]["x"]), record)}


def dinov3(encoder: Encoder, record: Record) -> Outputs:
    crops = [(record["inputs"]["x"], token_mask(record, encoder.patch))]
    if "x_local" in record["inputs"]:
        crops.append((record["inputs"]["x_local"], None))
    whole, *local = encoder(*(tuple(each) for each in zip(*crops, strict=True)))
    found = {
        "cls": whole.prefix_tokens[:, 0],
        "storage": whole.prefix_tokens[:, 1:],
        "patches": whole.tokens,
        "prenorm": whole.states,
    }
    for features in local:
        found |= {"local_cls": features.prefix_tokens[:, 0], "local_patches": features.tokens}
    return found


def convnext(encoder: Encoder, record: Record) -> Outputs:
    features = encoder(record["inputs"]["x"], layers=(3, 4))
    return {
        "cls": features.pooled,
        "patches": features.tokens,
        "intermediate0_patches": features.layers[0].tokens,
        "intermediate1_patches": features.layers[1].tokens,
    }


def transformers_vit(encoder: Encoder, record: Record) -> Outputs:
    features = encoder(record["inputs"]["x"], token_mask(record, encoder.patch))
    return {"last_hidden_state": everything(features), "pooler_output": features.pooled}


def transformers_convnext(encoder: Encoder, record: Record) -> Outputs:
    features = encoder(record["inputs"]["x"])
    whole = torch.cat([rearrange(features.pooled, "b d -> b 1 d"), features.tokens], dim=1)
    return {"last_hidden_state": whole, "pooler_output": features.pooled}


@dataclass(frozen=True)
class Case:
    """A file, the layout that reads it with what weights do not tell, and our values under the names it has."""

    file: str
    layout: str
    outputs: Callable[[Encoder, Record], Outputs]
    overrides: tuple[str, ...] = ()
    whole: bool = True  # whether our features have all that the recorded loss reads


CASES = (
    Case("hornet_7x7", "hornet", hornet, whole=False),
    Case("hornet_gf", "hornet", hornet, whole=False),
    Case("shunted", "shunted", shunted, ("heads=[2,2,4,4]",), whole=False),
    Case("focal", "focal", focal),
    Case("t2t_performer", "t2t", tokens_and_logits, ("heads=2",)),
    Case("deepvit", "deepvit", deepvit),
    Case("timesformer_divided", "timesformer", frames, ("heads=2",), whole=False),
    Case("timesformer_joint", "timesformer", frames, ("heads=4",), whole=False),
    Case("timesformer_space_only", "timesformer", frames, ("heads=2",), whole=False),
    Case("swin_moe_dense", "swin_moe", swin_moe),
    Case("dinov3_vit", "dinov3", dinov3, ("heads=2",)),
    Case("dinov3_vit_swiglu", "dinov3", dinov3, ("heads=2",)),
    Case("dinov3_convnext", "dinov3", convnext),
    Case("hf_dinov3_vit", "dinov3", transformers_vit, ("heads=2",)),
    Case("hf_dinov3_vit2", "dinov3", transformers_vit, ("heads=3",)),
    Case("hf_dinov3_convnext", "dinov3", transformers_convnext),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
def test_outputs_and_gradients_are_the_authors(case: Case, tmp_path: Path) -> None:
    record = recorded(f"{case.file}.pt")
    size = tuple(record["inputs"]["x"].shape[-2:])
    masked = "masks" in record["inputs"]
    encoder, found = imported(
        record["state_dict"], case.layout, tmp_path / "weights", *case.overrides, mask_token=masked, size=size
    )
    if masked:
        encoder.load_state_dict({"mask_token": found.method["encoder.mask_token"]}, strict=False)
    encoder.train(bool(record["config"].get("training", False)))

    ours, theirs = case.outputs(encoder, record), record["outputs"]
    compared = ours.keys() & theirs.keys()
    assert compared
    for name in compared:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=0)

    needed = record["outputs_in_loss"]
    assert (set(needed) <= ours.keys()) == case.whole
    if not case.whole:
        return
    loss = sum((ours[name] * record["cotangents"][name] + ours[name] ** 2 / 2).mean() for name in needed)
    assert loss.item() == pytest.approx(float(record["loss"]), rel=1e-5)
    loss.backward()
    state = gradients_as_state(record)
    slopes, _ = imported(state, case.layout, tmp_path / "gradients", *case.overrides, size=size)
    expected = dict(slopes.inner().named_parameters())
    for name, parameter in encoder.inner().named_parameters():
        if parameter.grad is not None and expected[name].norm() > 1e-7:
            assert relative_error(parameter.grad, expected[name]) < 1e-3, name


def test_navit_packed(tmp_path: Path) -> None:
    record = recorded("navit_packed.pt")
    encoder, _ = imported(record["state_dict"], "navit", tmp_path, "heads=2")
    encoder.eval()
    images, side = record["inputs"]["images"], record["config"]["patch_size"]
    grids = tuple((image.shape[-2] // side, image.shape[-1] // side) for image in images)
    patches = torch.cat([patchify(image[None], side)[0] for image in images])
    features = encoder(PackedImages(patches, grids))
    torch.testing.assert_close(features.pooled, record["outputs"]["pooled"], atol=1e-4, rtol=0)
    ours = features.of_images()
    for row, packed in zip(record["outputs"]["tokens"], record["config"]["packing"], strict=True):
        together = torch.cat([ours[number] for number in packed])
        torch.testing.assert_close(together, row[: len(together)], atol=1e-4, rtol=0)
