"""Losses, outputs and gradients against files recorded from the authors' own implementations.

The files are not part of this repository. `SELFSIGHT_PARITY=FOLDER pytest tests/parity` runs the comparison.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor

from pretrain.encoders import build_encoder
from pretrain.encoders.base import Mask
from pretrain.methods import Normalisation
from pretrain.methods.dino import Dino
from pretrain.methods.mae import MaskedAutoencoder
from pretrain.optim import set_rates
from pretrain.schedules import Cosine, Timeline
from pretrain.schema import DinoConfig, MaeConfig, MaskConfig, VitConfig

#: Inputs of the recorded runs are normalised already.
AS_IT_IS = Normalisation((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))


def recorded(name: str) -> dict[str, Any]:
    folder = os.environ.get("SELFSIGHT_PARITY")
    if not folder:
        pytest.skip("set SELFSIGHT_PARITY to the folder of recorded values")
    return torch.load(Path(folder) / name, weights_only=True)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def test_mae() -> None:
    record = recorded("mae_normpix0.pt")
    encoder = build_encoder(
        VitConfig(dim=96, depth=3, heads=3, patch=8, positions="sincos", pool="mean"), image_size=(64, 64)
    )
    config = MaeConfig(
        mask=MaskConfig(unit=8, ratio=0.75), decoder_dim=64, decoder_depth=2, decoder_heads=4, norm_pix_loss=False
    )
    method = MaskedAutoencoder(config, encoder, (64, 64), 3, AS_IT_IS, Timeline(10, 10.0))

    def ours(name: str) -> str:
        return name if name.startswith(("decoder", "mask_token")) else f"encoder.vit.{name}"

    theirs = record["state_dict"]
    torch.testing.assert_close(theirs.pop("decoder_pos_embed")[:, 1:], method.decoder_positions)
    torch.testing.assert_close(theirs["pos_embed"], encoder.vit.pos_embed.data)
    method.load_state_dict({ours(name): value for name, value in theirs.items()})

    hidden = record["mask"].bool()
    features = encoder(record["x"], Mask(rearrange(hidden, "b (h w) -> b h w", h=8)))
    raster = torch.argsort(torch.argsort(record["noise"], dim=1)[:, : features.tokens.shape[1]], dim=1)
    latent = record["latent"][:, 1:].gather(1, repeat(raster, "b n -> b n d", d=96))
    torch.testing.assert_close(features.tokens, latent, atol=1e-4, rtol=0)
    predicted = method.decode(features)
    torch.testing.assert_close(predicted, record["pred"], atol=1e-4, rtol=0)
    loss = method.loss(predicted, record["x"], hidden)
    assert float(loss) == pytest.approx(record["loss"], rel=1e-5)
    loss.backward()
    parameters = dict(method.named_parameters())
    for name, gradient in record["grads"].items():
        assert relative_error(parameters[ours(name)].grad, gradient) < 1e-3, name


def test_dino() -> None:
    """Three steps with the authors' own clipping (each parameter by itself), which DeepSpeed does not have."""
    record = recorded("dino.pt")
    steps_per_epoch, total_steps = 1.0, len(record["lr"])
    timeline = Timeline(total_steps, steps_per_epoch)
    lr = Cosine(1e-3, 1e-6, total_steps, warmup_steps=2, inclusive=True)
    decay = Cosine(0.04, 0.4, total_steps)
    momentum = Cosine(float(record["mom"][0]), 1.0, total_steps)
    for schedule, theirs in ((lr, record["lr"]), (decay, record["wd"]), (momentum, record["mom"])):
        assert [schedule(step) for step in range(total_steps)] == pytest.approx(theirs.tolist(), abs=1e-9)

    vit = VitConfig(dim=48, depth=2, heads=3, patch=8)
    config = DinoConfig(
        prototypes=128,
        head_hidden=64,
        head_bottleneck=32,
        teacher_temperature=0.07,
        warmup_teacher_temperature=0.04,
        warmup_teacher_temperature_epochs=2,
        teacher_momentum=float(record["mom"][0]),
    )
    method = Dino(config, build_encoder(vit, (32, 32)), build_encoder(vit, (32, 32)), AS_IT_IS, timeline)

    def ours(name: str) -> str:
        return name.replace("backbone.", "encoder.vit.")

    start = {ours(name): value for name, value in record["init"].items()}
    teacher = {f"teacher.{name}": value for name, value in start.items()}
    missing, unexpected = method.load_state_dict(start | teacher, strict=False)
    assert (set(missing), unexpected) == ({"center"}, [])

    crops = record["crops"]
    batch: Any = {
        "global_crops": torch.stack(crops[:2], dim=1),
        "local_crops": torch.stack(crops[2:], dim=1),
    }
    parameters = dict(method.named_parameters())
    groups = [
        {
            "params": [parameters[ours(name)]],
            "lr_scale": 1.0,
            "decay": decayed,
            "frozen_until": method.frozen_until(name),
        }
        for names, decayed in zip(record["param_groups"], (True, False), strict=True)
        for name in names
    ]
    optimizer = torch.optim.AdamW(groups)
    for step, theirs in enumerate(record["steps"]):
        set_rates(optimizer.param_groups, step, lr, decay)
        loss = method(batch, step)["loss"]
        assert float(loss) == pytest.approx(theirs["loss"], rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, gradient in record["grads_step0_preclip"].items():
                assert relative_error(parameters[ours(name)].grad, gradient) < 1e-3, name
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                torch.nn.utils.clip_grad_norm_(parameter, 3.0)
                if step < group["frozen_until"]:
                    parameter.grad = None
        optimizer.step()
        method.after_step(step)
        torch.testing.assert_close(method.center, theirs["center"], atol=1e-4, rtol=0)
    state = method.state_dict()
    for name, value in record["student"].items():
        torch.testing.assert_close(state[ours(name)], value, atol=1e-4, rtol=0)
    for name, value in record["teacher"].items():
        torch.testing.assert_close(state[f"teacher.{ours(name)}"], value, atol=1e-4, rtol=0)
