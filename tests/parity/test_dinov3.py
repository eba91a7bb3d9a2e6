"""DINOv3's losses, head, rotary positions and stochastic depth against recorded values; see test_parity.py.

All are met but which samples stochastic depth drops: the authors leave out a fixed number of the samples that a GPU
has at hand, so that a sample's lot hangs on the number of GPUs. Ours draws for each row of the global batch by itself
(encoders/drop_path.py). Given their draws, our blocks compute what theirs do, which is what is compared here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange, repeat
from parity_files import imported, recorded, relative_error
from torch import Tensor
from torch.nn import functional as F

from pretrain.encoders import drop_path, rotary
from pretrain.encoders.drop_path import Chosen
from pretrain.encoders.position_settings import RotaryPositions
from pretrain.methods.dino.config import DinoConfig
from pretrain.methods.dino.head import DinoHead
from pretrain.methods.dino.koleo import koleo_loss
from pretrain.methods.dino.losses import dino_loss, ibot_loss, moved_center, sinkhorn_knopp
from pretrain.methods.gram import gram_loss

Record = dict[str, Any]


def case_of(name: str) -> tuple[Record, dict[str, Tensor], dict[str, float]]:
    """The record of all losses, and of one case its inputs and settings; the student's are to be learned from."""
    record = recorded("dinov3_losses.pt")
    inputs = {key: value.clone() for key, value in record["inputs"][name].items()}
    for key in ("student", "x"):
        if key in inputs:
            inputs[key].requires_grad_()
    return record, inputs, record["config"][name]


def check(record: Record, name: str, loss: Tensor, student: Tensor) -> None:
    assert loss.item() == pytest.approx(float(record["loss"][name]), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    (expected,) = record["grads"][name].values()
    assert relative_error(gradient, expected) < 1e-3


def of_local_crops(student: Tensor, targets: Tensor) -> Tensor:
    """The share of local crops in the loss, a mean over their pairs with all teacher views."""
    whole = torch.cat([torch.zeros_like(student[: len(targets)]), student])
    pairs = len(targets) * (len(whole) - 1)
    with_local, without = (dino_loss(whole, targets, local_weight=weight) for weight in (1.0, 0.0))
    return (with_local - without) * pairs / (len(targets) * len(student))


@pytest.mark.parametrize("name", ["dino_sinkhorn", "dino_sinkhorn_no_diagonal", "dino_centred"])
def test_dino_loss(name: str) -> None:
    record, inputs, settings = case_of(name)
    student, teacher = inputs["student"], inputs["teacher"]
    rows = rearrange(teacher, "v b k -> (v b) k")
    if name == "dino_centred":
        probabilities = ((rows - inputs["center"]) / settings["teacher_temp"]).softmax(dim=-1)
        moved = moved_center(inputs["center"], rows.sum(dim=0), torch.tensor(float(len(rows))), 0.9)
        torch.testing.assert_close(moved, record["outputs"][name]["center_after"], atol=1e-5, rtol=0)
    else:
        probabilities = sinkhorn_knopp(rows, settings["teacher_temp"], settings["n_iterations"])
    targets = rearrange(probabilities, "(v b) k -> v b k", v=len(teacher))
    torch.testing.assert_close(targets, record["outputs"][name]["teacher_probs"], atol=1e-5, rtol=0)
    scores = student / settings["student_temp"]
    loss = dino_loss(scores, targets) if name.endswith("no_diagonal") else of_local_crops(scores, targets)
    check(record, name, loss, student)


def test_ibot_loss() -> None:
    record, inputs, settings = case_of("ibot_sinkhorn")
    student, masks = inputs["student"], inputs["masks"]
    targets = sinkhorn_knopp(inputs["teacher"][masks], settings["teacher_temp"], settings["n_iterations"])
    expected = record["outputs"]["ibot_sinkhorn"]
    torch.testing.assert_close(targets, expected["teacher_probs_masked"], atol=1e-5, rtol=0)
    weights = repeat(1 / masks.sum(dim=1), "b -> b n", n=masks.shape[1])[masks]
    torch.testing.assert_close(weights, expected["masks_weight"])
    loss = ibot_loss(student[masks] / settings["student_temp"], targets, weights, len(masks))
    check(record, "ibot_sinkhorn", loss, student)


@pytest.mark.parametrize("name", ["koleo", "koleo_top2"])
def test_koleo(name: str) -> None:
    record, inputs, settings = case_of(name)
    check(record, name, koleo_loss(inputs["x"], neighbours=int(settings.get("topk", 1))), inputs["x"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gram", {"negatives": "clip"}),
        ("gram_batch_level", {"negatives": "clip"}),
        ("gram_keep_negatives", {}),
        ("gram_teacher_negatives", {"negatives": "clip_teacher"}),
        ("gram_no_norm", {"normalise": False, "negatives": "clip"}),
    ],
)
def test_gram_loss(name: str, settings: dict[str, Any]) -> None:
    record, inputs, config = case_of(name)
    tokens = [inputs["student"], inputs["teacher"]]
    if not config["img_level"]:
        tokens = [rearrange(part, "b n d -> 1 (b n) d") for part in tokens]
    check(record, name, gram_loss(*tokens, **settings), inputs["student"])


def test_head() -> None:
    record = recorded("dinov3_head.pt")
    config = record["config"]
    settings = DinoConfig(
        prototypes=config["out_dim"],
        head_hidden_dim=config["hidden_dim"],
        head_bottleneck_dim=config["bottleneck_dim"],
        last_layer="plain",
        norm_last_layer=False,
    )
    head = DinoHead(config["in_dim"], settings)
    head.load_state_dict(record["state_dict"])
    logits = head(record["inputs"]["x"])
    torch.testing.assert_close(logits, record["outputs"]["logits"], atol=1e-5, rtol=0)
    bottleneck = F.normalize(head.mlp(record["inputs"]["x"]), dim=-1)
    torch.testing.assert_close(bottleneck, record["outputs"]["bottleneck"], atol=1e-5, rtol=0)
    loss = (logits * record["cotangents"]["logits"] + logits**2 / 2).mean()
    assert loss.item() == pytest.approx(float(record["loss"]), rel=1e-5)
    loss.backward()
    for name, parameter in head.named_parameters():
        assert relative_error(parameter.grad, record["grads"][name]) < 1e-3, name


def uniform(drawn: dict[str, Tensor], settings: RotaryPositions) -> np.ndarray:
    """(1, 5) numbers in 0 .. 1 that stand for the authors' draws: shift, jitter (before exp), rescale (before exp)."""
    ranges = {"shift": settings.shift, "jitter": np.log(settings.jitter), "rescale": np.log(settings.rescale)}
    parts = []
    for name, count in (("shift", 2), ("jitter", 2), ("rescale", 1)):
        values = drawn.get(f"drawn_{name}_coords", torch.zeros(count)).numpy().astype(np.float64)
        parts.append((values / ranges[name] + 1) / 2 if ranges[name] else np.full(count, 0.5))
    return np.concatenate(parts)[None]


@pytest.mark.parametrize("name", ["separate", "max", "min", "periods", "bf16", "rescale", "all"])
def test_rotary_positions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = recorded("dinov3_rope.pt")
    config, outputs = record["config"][name], record["outputs"]
    settings = RotaryPositions(
        base=config["base"],
        periods=(config["min_period"], config["max_period"]) if config["base"] is None else None,
        normalise=config.get("normalize_coords", "separate"),
        shift=config.get("shift_coords", 0.0),
        jitter=config.get("jitter_coords", 1.0),
        rescale=config.get("rescale_coords", 1.0),
        dtype="bf16" if config["dtype"] == "bfloat16" else "fp32",
    )
    width = config["embed_dim"] // config["heads"]
    torch.testing.assert_close(rotary.periods(settings, width), outputs[f"{name}.periods"], atol=1e-6, rtol=1e-6)
    drawn = uniform(record["inputs"][name], settings)
    monkeypatch.setattr(drop_path, "uniforms_of_the_step", lambda *given: drawn)
    grid, device = (config["H"], config["W"]), torch.device("cpu")
    (turn,) = rotary.turns_of(settings, grid, None, width, 0, 1, device, training=config["training"])
    cosines, sines = (repeat(part, "1 n k -> n (two k)", two=2) for part in turn)
    torch.testing.assert_close(cosines, outputs[f"{name}.cos"], atol=2e-6, rtol=0)
    torch.testing.assert_close(sines, outputs[f"{name}.sin"], atol=2e-6, rtol=0)


def test_stochastic_depth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = recorded("dinov3_droppath.pt")
    inputs, rate = record["inputs"], record["config"]["drop_path_rate"]
    overrides = ("heads=2", f"drop_path={rate}")
    encoder, _ = imported(record["state_dict"], "dinov3", tmp_path, *overrides, mask_token=True, size=(32, 32))
    encoder.train()
    kept = [order[: max(int(len(order) * (1 - rate)), 1)].numpy() for order in inputs["permutations"]]
    branches = [
        Chosen(rows, np.full(len(rows), len(order) / len(rows)))
        for rows, order in zip(kept, inputs["permutations"], strict=True)
    ]
    passes = iter((branches[0::2], branches[1::2]))  # of all global crops, then of all local ones
    monkeypatch.setattr(drop_path, "choose_paths", lambda *given: next(passes))
    whole, local = encoder((inputs["x"], inputs["x_local"]), (None, None))
    found = {
        "cls": whole.prefix_tokens[:, 0],
        "patches": whole.tokens,
        "local_cls": local.prefix_tokens[:, 0],
        "local_patches": local.tokens,
    }
    for name, value in found.items():
        torch.testing.assert_close(value, record["outputs"][name], atol=1e-4, rtol=0)
    loss = sum((found[name] * record["cotangents"][name] + found[name] ** 2 / 2).mean() for name in found)
    assert loss.item() == pytest.approx(float(record["loss"]), rel=1e-5)
