"""What holds for every method x encoder, and each method's loss as slow loops from its paper."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import build, config_data, random_batch

from pretrain.config import Config
from pretrain.config.load import parse_config
from pretrain.encoders.base import refine
from pretrain.encoders.patches import patchify, sincos_positions, unpatchify
from pretrain.engines.optim import build_optimizer, set_rates
from pretrain.engines.schedules import Cosine
from pretrain.methods.dino.config import DinoConfig
from pretrain.methods.dino.head import DinoHead, WeightNormLinear
from pretrain.methods.dino.losses import dino_loss
from pretrain.methods.dino.method import Dino
from pretrain.methods.mae.config import MaeConfig
from pretrain.methods.mae.method import MaskedAutoencoder
from pretrain.methods.mim.config import MimConfig


def test_gradients_reach_every_trainable_parameter(cell: Config) -> None:
    method = build(cell).train()
    method(random_batch(cell), 0)["loss"].backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0 or name.endswith("weight_g"), name
        else:
            assert parameter.grad is None, name


def test_a_few_steps_lower_the_loss_of_one_batch(cell: Config) -> None:
    method = build(cell).train()
    batch = random_batch(cell)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], 3e-3)
    losses = []
    for step in range(15):
        loss = method(batch, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03 * abs(losses[0])


def test_pictures_are_uint8_rows_of_the_batch(cell: Config) -> None:
    method = build(cell).eval()
    before = copy.deepcopy(method.state_dict())
    for name, picture in method.pictures(random_batch(cell)).items():
        assert picture.dtype == torch.uint8, name
        assert picture.shape[:2] == (4, 3)
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_hidden_pixels_do_not_reach_the_prediction(cell: Config) -> None:
    if not isinstance(cell.method, MaeConfig | MimConfig):
        assert "drop_mask" not in random_batch(cell)
        assert "token_mask" not in random_batch(cell)
        return
    method: Any = build(cell).eval()
    first, second = random_batch(cell), random_batch(cell)
    hidden = first["drop_mask" if "drop_mask" in first else "token_mask"]
    assert hidden is not None
    pixels = refine(hidden, (32, 32))[:, None, None]
    other = random_batch(cell, seed=9)["global_crops"]
    second["global_crops"] = torch.where(pixels, other, first["global_crops"])

    def predict(batch: Any) -> torch.Tensor:
        images = method.normalise(batch["global_crops"][:, 0])
        return (
            method.decode(method.encoder(images, _mask(batch)))
            if cell.method.name == "mae"
            else method.predict(images, batch)
        )

    assert torch.equal(predict(first), predict(second))


def _mask(batch: Any) -> Any:
    from pretrain.methods.base import mask_of

    return mask_of(batch)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_mae_loss_is_the_papers(norm_pix_loss: bool, mae_data: dict[str, Any]) -> None:
    mae_data["method"]["norm_pix_loss"] = norm_pix_loss
    config = parse_config(mae_data)
    method: Any = build(config)
    batch = random_batch(config)
    images = method.normalise(batch["global_crops"][:, 0])
    predicted, hidden = method.reconstruct(images, batch)
    total, count = 0.0, 0
    for image in range(4):
        for row in range(8):
            for column in range(8):
                if not batch["drop_mask"][image, row, column]:
                    continue
                patch = images[image, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
                values = [float(patch[c, y, x]) for y in range(4) for x in range(4) for c in range(3)]
                if norm_pix_loss:  # the unbiased variance: divided by n - 1
                    mean = sum(values) / 48
                    variance = sum((value - mean) ** 2 for value in values) / 47
                    values = [(value - mean) / math.sqrt(variance + 1e-6) for value in values]
                guess = predicted[image, row * 8 + column].tolist()
                total += sum((a - b) ** 2 for a, b in zip(guess, values, strict=True)) / 48
                count += 1
    assert count == 4 * 48
    assert float(method.loss(predicted, images, hidden).detach()) == pytest.approx(total / count, rel=1e-5)


def test_mae_learns_from_hidden_patches_as_if_all_were_decoded(mae_data: dict[str, Any]) -> None:
    config = parse_config(mae_data)
    method: Any = build(config)
    batch = random_batch(config)
    images = method.normalise(batch["global_crops"][:, 0])
    short = method(batch, 0)["loss"]
    predicted, hidden = method.reconstruct(images, batch)
    whole = method.loss(predicted, images, hidden)
    torch.testing.assert_close(short, whole)
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    gradients = [torch.autograd.grad(loss, trained) for loss in (short, whole)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_mae_decodes_each_token_at_its_own_position(shards: Any, tmp_path: Any) -> None:
    """Tokens shuffled together with their unit indices decode to the same image: no order is assumed."""
    for family in ("vit", "swin"):
        config = parse_config(config_data("mae", family, shards, tmp_path))
        method = build(config).eval()
        assert isinstance(method, MaskedAutoencoder)
        batch = random_batch(config)
        features = method.encoder(method.normalise(batch["global_crops"][:, 0]), _mask(batch))
        order = torch.randperm(features.tokens.shape[1], generator=torch.Generator().manual_seed(0))
        assert features.ids_keep is not None
        shuffled = features._replace(tokens=features.tokens[:, order], ids_keep=features.ids_keep[:, order])
        torch.testing.assert_close(method.decode(shuffled), method.decode(features))


def test_sincos_positions_put_the_width_first() -> None:
    positions = sincos_positions(8, (2, 3))
    for row in range(2):
        for column in range(3):
            expected = [f(axis * w) for axis in (column, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
            assert positions[row * 3 + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_patches_go_together_again() -> None:
    images = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    patches = patchify(images, 4)
    assert patches[0, 1].tolist() == images[0, :, :4, 4:8].permute(1, 2, 0).flatten().tolist()
    torch.testing.assert_close(unpatchify(patches, (2, 3), 4), images)


def test_simmim_loss_is_the_papers(shards: Any, tmp_path: Any) -> None:
    config = parse_config(config_data("mim", "vit", shards, tmp_path))
    method: Any = build(config)
    batch = random_batch(config)
    images = method.normalise(batch["global_crops"][:, 0])
    guess = method.target.to_image(method.predict(images, batch))
    total, hidden_pixels = 0.0, 0
    for image in range(4):
        for y in range(32):
            for x in range(32):
                if batch["token_mask"][image, y // 4, x // 4]:
                    hidden_pixels += 1
                    total += float((guess[image, :, y, x] - images[image, :, y, x]).abs().sum())
    expected = total / (hidden_pixels + 1e-5) / 3
    assert float(method(batch, 0)["loss"].detach()) == pytest.approx(expected, rel=1e-5)


def test_mim_loss_over_micro_batches_is_the_loss_of_the_batch(shards: Any, tmp_path: Any) -> None:
    """Blockwise masks differ in size, so a mean of local means would be another number."""
    from pretrain.methods.mim.method import reduce_mask_counts

    config = parse_config(config_data("mim", "vit", shards, tmp_path))
    method = build(config).eval()
    whole = random_batch(config, size=8)
    whole["token_mask"][:4, :4] = False
    halves: list[Any] = [
        {key: value[rows] if value is not None else None for key, value in whole.items()}
        for rows in (slice(0, 4), slice(4, 8))
    ]
    counts = [int(half["token_mask"].sum()) for half in halves]
    assert counts[0] != counts[1]
    reduce_mask_counts(halves)
    mean = sum(float(method(half, 0)["loss"].detach()) for half in halves) / 2
    assert mean == pytest.approx(float(method(whole, 0)["loss"].detach()), rel=1e-5)


def test_dino_loss_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 3, 7, generator=generator) / 0.1
    teacher = (torch.randn(2, 3, 7, generator=generator) / 0.04).softmax(dim=-1)
    total, pairs = 0.0, 0
    for view in range(2):
        for other in range(5):
            if view == other:
                continue
            pairs += 1
            for image in range(3):
                scores = student[other, image]
                exponents = [math.exp(float(score - scores.max())) for score in scores]
                for k in range(7):
                    total -= float(teacher[view, image, k]) * math.log(exponents[k] / sum(exponents)) / 3
    assert pairs == 8
    assert float(dino_loss(student, teacher)) == pytest.approx(total / pairs, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # which would round it to three digits, and its gradient
        assert float(dino_loss(student, teacher)) == pytest.approx(total / pairs, rel=1e-5)


@pytest.fixture
def dino(shards: Any, tmp_path: Any) -> tuple[Config, Dino]:
    config = parse_config(config_data("dino", "vit", shards, tmp_path))
    method = build(config)
    assert isinstance(method, Dino)
    return config, method.train()


def test_centre_moves_after_the_loss_and_once_a_step(dino: tuple[Config, Dino]) -> None:
    config, method = dino
    batches = [random_batch(config, seed=seed) for seed in (1, 2)]
    outputs = []
    for batch in batches:
        method(batch, 0)
        assert torch.equal(method.center, torch.zeros_like(method.center))  # two micro-batches, one centre
        images = method.normalise(batch["global_crops"].flatten(0, 1))
        outputs.append(method.teacher["head"](method.teacher["encoder"](images).pooled))
    expected = 0.1 * torch.cat(outputs).mean(dim=0, keepdim=True)
    method.after_step(0)
    torch.testing.assert_close(method.center, expected)
    method(batches[0], 1)
    method.after_step(1)
    torch.testing.assert_close(method.center, 0.9 * expected + 0.1 * outputs[0].mean(dim=0, keepdim=True))


def test_teacher_is_the_slow_average_and_stays_fp32(dino: tuple[Config, Dino]) -> None:
    config, method = dino
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.add_(1e-3)
    before = copy.deepcopy(method.teacher["encoder"].state_dict())
    method(random_batch(config), 0)
    method.after_step(0)
    momentum = method.momentum(0)
    assert momentum == pytest.approx(0.9)
    for (name, slow), fast in zip(
        method.teacher["encoder"].named_parameters(), method.encoder.parameters(), strict=True
    ):
        assert slow.dtype == torch.float32
        assert not slow.requires_grad
        torch.testing.assert_close(slow, momentum * before[name] + (1 - momentum) * fast)


def test_a_bf16_teacher_would_stand_still() -> None:
    """Why parameters and average are kept in fp32: the smallest step of bf16 near 1 is 2^-7."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        slow, fast = torch.ones((), dtype=dtype), torch.tensor(1.0078125, dtype=dtype)
        for _ in range(4000):
            slow.lerp_(fast, 0.004)
        moved[dtype] = float(slow)
    assert moved[torch.bfloat16] == 1.0
    assert moved[torch.float32] == pytest.approx(1.0078125, abs=1e-4)


def test_teacher_has_no_drop_path(shards: Any, tmp_path: Any) -> None:
    data = config_data("dino", "vit", shards, tmp_path)
    data["encoder"]["drop_path"] = 0.5
    method = build(parse_config(data)).train()
    assert isinstance(method, Dino)
    rates = {
        side: sorted({m.drop_prob for m in encoder.modules() if type(m).__name__ == "DropPath"})
        for side, encoder in (("student", method.encoder), ("teacher", method.teacher["encoder"]))
    }
    assert rates == {"student": [0.5], "teacher": []}
    assert not method.teacher.training


def test_head_normalises_and_keeps_its_prototypes_unit() -> None:
    torch.manual_seed(0)
    head = DinoHead(16, DinoConfig(prototypes=10, head_hidden_dim=8, head_bottleneck_dim=4))
    scores = head(torch.randn(5, 16))
    assert scores.abs().max() <= 1 + 1e-6  # cosines
    free = WeightNormLinear(4, 10, fixed_norm=False)
    assert free.weight_g.requires_grad
    assert not head.last_layer.weight_g.requires_grad
    weight = head.last_layer.weight_v
    expected = torch.stack([row / math.sqrt(float((row * row).sum())) for row in weight])
    torch.testing.assert_close(head.last_layer(torch.eye(4)), expected.T)


def test_prototypes_thaw_at_the_set_rate(dino: tuple[Config, Dino]) -> None:
    """Adam moves a parameter by about its rate; the first steps after the freeze must not be longer."""
    config, method = dino
    thaw = method.frozen_until("head.last_layer.weight_v")
    assert thaw > 0
    optimizer = build_optimizer(method, config.optim)
    prototypes, rate = method.head.last_layer.weight_v, 1e-3
    moved = {}
    for step in range(thaw + 3):
        method.zero_grad()
        method(random_batch(config, seed=step), step)["loss"].backward()
        set_rates(optimizer.param_groups, step, Cosine(rate, rate, 100), Cosine(0.0, 0.0, 100))
        before = prototypes.detach().clone()
        optimizer.step()
        moved[step] = float((prototypes.detach() - before).abs().mean())
    assert all(moved[step] == 0.0 for step in range(thaw))
    assert all(0.0 < moved[step] < 1.5 * rate for step in range(thaw, thaw + 3))


def test_frozen_encoder_of_dino_is_the_teacher(dino: tuple[Config, Dino]) -> None:
    _, method = dino
    assert method.frozen_encoder() is method.teacher["encoder"]


@pytest.mark.parametrize(("family", "encoder"), [("swin", {}), ("vit", {"class_token": False, "pool": "mean"})])
def test_without_a_class_token_the_tokens_are_drawn(
    shards: Any, tmp_path: Any, family: str, encoder: dict[str, Any]
) -> None:
    data = config_data("dino", family, shards, tmp_path)
    data["encoder"] |= encoder
    config = parse_config(data)
    method = build(config).eval()
    ((label, picture),) = method.pictures(random_batch(config)).items()
    assert "three main directions" in label
    assert picture.shape == (4, 3, 32, 64)
    assert picture.dtype == torch.uint8
    assert picture[..., 32:].amax() == 255


def test_what_cannot_be_drawn_is_left_out(shards: Any, tmp_path: Any) -> None:
    config = parse_config(config_data("dino", "swin", shards, tmp_path))
    method = build(config).eval()
    with torch.no_grad():
        next(method.teacher["encoder"].parameters()).fill_(float("inf"))
    assert method.pictures(random_batch(config)) == {}


def test_normalisation_goes_there_and_back(dino: tuple[Config, Dino]) -> None:
    _, method = dino
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4), dtype=np.uint8))
    normalised = method.normalise(crops)
    assert float(normalised[0, 1, 0, 0]) == pytest.approx((int(crops[0, 1, 0, 0]) / 255 - 0.4) / 0.25, abs=1e-5)
    assert torch.equal(method.to_pictures(normalised, crops), crops)
