"""Images at their own shape through a whole run: DINO in one packed pass, resumed, on any number of micro-batches."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import webdataset as wds
from einops import rearrange
from prefork import OF_THIS_CHECKOUT
from test_cells import finish
from test_train import column, run_all
from tiny import build, config_data

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.loader import Batch
from pretrain.checkpoints.folder import CheckpointFolder
from pretrain.config import Config
from pretrain.config.load import check_batch, parse_config
from pretrain.encoders.base import Mask
from pretrain.encoders.native import PackedImages, PackedMask
from pretrain.encoders.patches import patch_statistics, patchify, sincos_positions, unpatchify
from pretrain.methods.dino.losses import dino_loss
from pretrain.methods.mae.native import hidden_of
from pretrain.methods.mim.hog import oriented_gradients
from pretrain.run import pretrain
from pretrain.stream.batches import to_device
from pretrain.stream.datasets import sampler_of
from pretrain.stream.loading import loader_of
from pretrain.stream.native_batch import canvases

NATIVE = {"shape": "native", "patch": 4, "scale": [0.5, 1.0]}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of several aspect ratios."""
    folder = tmp_path_factory.mktemp("shapes")
    generator = torch.Generator().manual_seed(0)
    with wds.TarWriter(str(folder / "train-000000.tar")) as writer:
        for number in range(24):
            size = (12 + 5 * (number % 5), 40 - 6 * (number % 4))
            coarse = torch.rand(1, 3, 4, 4, generator=generator)
            pixels = (F.interpolate(coarse, size, mode="bicubic").clamp(0, 1)[0] * 255).to(torch.uint8)
            writer.write({"__key__": f"{number:06d}", "png": rearrange(pixels, "c h w -> h w c").numpy()})
    return folder


def data(kind: str, shards: Path, runs: Path, **sections: Any) -> dict[str, Any]:
    given = config_data(kind, "vit", shards, runs)
    given["name"] = "cell"
    given["encoder"] = {"family": "navit", "dim": 32, "depth": 2, "heads": 2, "patch": 4}
    given["views"] = {"global_crops": [{**NATIVE, "max_tokens": 24}] * len(given["views"]["global_crops"])}
    if kind == "dino":
        given["views"]["local_crops"] = {**NATIVE, "max_tokens": 8, "count": 2, "scale": [0.1, 0.5]}
    given["train"] = {"steps": 2, "batch_size": 4}
    given["checkpoint"] = {"every_steps": 1}
    return {**given, **{name: {**given.get(name, {}), **values} for name, values in sections.items()}}


def batch_of(config: Config, step: int = 0) -> Batch:
    with open_dataset(config.data.train) as dataset:
        sampler = sampler_of(config, [dataset])
        with loader_of(config, sampler, workers=0, threads=1) as loader:
            (batch,) = next(loader.steps(step))
            return to_device(batch, torch.device("cpu"))


def one_by_one(images: PackedImages, patch: int = 4) -> list[torch.Tensor]:
    """(c, h, w) of each."""
    parts = images.patches.split(list(images.lengths))
    return [unpatchify(part[None], grid, patch)[0] for part, grid in zip(parts, images.grids, strict=True)]


VIT = {"family": "vit", "registers": 1}
DINOV3 = {"family": "dinov3", "registers": 1}


@pytest.mark.parametrize(
    "encoder", [{"pool": "mean"}, {"pool": "attention"}, VIT, DINOV3], ids=["mean", "attention", "vit", "dinov3"]
)
def test_dino_in_one_pass_is_dino_crop_by_crop(encoder: dict[str, Any], shapes: Path, tmp_path: Path) -> None:
    config = parse_config(data("dino", shapes, tmp_path, encoder=encoder))
    method, batch = build(config).train(), batch_of(config)
    result = method(batch, 0)
    wide, small = one_by_one(method.packed(batch)), one_by_one(method.packed(batch, "local"))
    assert len({crop.shape for crop in wide}) > 2
    teacher = method.teacher
    with torch.no_grad():
        seen = [teacher["head"](teacher["encoder"](crop[None]).pooled) for crop in wide]
        targets = ((torch.cat(seen) - method.center) / method.teacher_temperature(0)).softmax(dim=-1)
    student = torch.cat([method.head(method.encoder(crop[None]).pooled) for crop in [*wide, *small]])
    expected = dino_loss(rearrange(student / 0.1, "(v b) k -> v b k", b=4), rearrange(targets, "(v b) k -> v b k", b=4))
    torch.testing.assert_close(result["loss"], expected, rtol=1e-5, atol=1e-6)
    result["loss"].backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("encoder", [{}, VIT | {"pool": "mean"}], ids=["navit", "vit"])
def test_mae_in_one_sequence_is_mae_image_by_image(encoder: dict[str, Any], shapes: Path, tmp_path: Path) -> None:
    config = parse_config(data("mae", shapes, tmp_path, encoder=encoder))
    method, batch = build(config).train(), batch_of(config)
    for block in method.decoder_blocks:
        torch.nn.init.normal_(block.attn.qkv.bias, std=0.3)
    loss = method(batch, 0)["loss"]
    images = method.packed(batch)
    masks = batch["drop_mask"].split(list(images.lengths))
    assert [int(hidden.sum()) for hidden in masks] == [-(-3 * len(hidden) // 4) for hidden in masks]
    expected = []
    for image, grid, hidden in zip(one_by_one(images), images.grids, masks, strict=True):
        shown = method.encoder(image[None], Mask(drop=rearrange(hidden, "(h w) -> 1 h w", h=grid[0])))
        full = method.mask_token.expand(1, len(hidden), -1).clone()
        full[:, ~hidden] = method.decoder_embed(shown.tokens)
        full = full + sincos_positions(full.shape[-1], grid)
        if shown.prefix_tokens is not None:
            full = torch.cat([method.decoder_embed(shown.prefix_tokens), full], dim=1)
        for block in method.decoder_blocks:
            full = block(full)
        predicted = method.decoder_pred(method.decoder_norm(full))[0, -len(hidden) :][hidden]
        target = patchify(image[None], 4)[0, hidden]
        mean, deviation = patch_statistics(target)
        expected.append((predicted - (target - mean) / deviation).square().mean())
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    other = {**batch, "global_patches": batch["global_patches"].clone()}  # what is hidden, only the target knows
    other["global_patches"][batch["drop_mask"]] = 0
    again = method.encoder(method.packed(other), hidden_of(other, torch.device("cpu")).mask)
    torch.testing.assert_close(again.tokens, method.encoder(images, hidden_of(batch, torch.device("cpu")).mask).tokens)


@pytest.mark.parametrize("target", ["pixels", "normalised_pixels"])
def test_mim_in_one_sequence_is_mim_image_by_image(target: str, shapes: Path, tmp_path: Path) -> None:
    given = data("mim", shapes, tmp_path)
    given["method"] = {"name": "mim", "target": target, "mask": {"ratio": 0.5, "unit": 4}}
    config = parse_config(given)
    method, batch = build(config).train(), batch_of(config)
    loss = method(batch, 0)["loss"]
    images = method.packed(batch)
    masks = batch["token_mask"].split(list(images.lengths))
    assert len({int(hidden.sum()) for hidden in masks}) > 1
    errors, count = torch.zeros(()), int(batch["token_mask"].sum())
    for image, grid, hidden in zip(one_by_one(images), images.grids, masks, strict=True):
        seen = method.encoder(image[None], Mask(token=rearrange(hidden, "(h w) -> 1 h w", h=grid[0])))
        predicted = method.head(seen.tokens)[0, hidden]
        wanted = rearrange(image, "c (h p) (w q) -> (h w) c p q", p=4, q=4)[hidden]
        if target == "pixels":  # SimMIM's order: channel, row, column
            errors = errors + (predicted - wanted.flatten(1)).abs().mean(dim=1).sum()
        else:
            flat = rearrange(wanted, "n c p q -> n (p q c)")
            flat = (flat - flat.mean(dim=1, keepdim=True)) / (flat.var(dim=1, keepdim=True) + 1e-6).sqrt()
            errors = errors + (predicted - flat).square().mean(dim=1).sum()
    torch.testing.assert_close(loss, errors / count, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("encoder", [{}, DINOV3], ids=["navit", "dinov3"])
@pytest.mark.parametrize("separate", [False, True])
def test_ibot_in_one_sequence_is_ibot_crop_by_crop(
    encoder: dict[str, Any], separate: bool, shapes: Path, tmp_path: Path
) -> None:
    ibot = {"separate_head": separate, "masked_share": 0.7}
    config = parse_config(data("dino", shapes, tmp_path, encoder=encoder, method={"ibot": ibot}))
    method, batch = build(config).train(), batch_of(config)
    result = method(batch, 0)
    wide = one_by_one(method.packed(batch))
    grids = method.packed(batch).grids
    masks = batch["token_mask"].split([rows * columns for rows, columns in grids])
    assert sum(bool(mask.any()) for mask in masks) == round(0.7 * len(masks))
    head = "patch_head" if separate else "head"
    losses = []
    for crop, grid, mask in zip(wide, grids, masks, strict=True):
        seen = method.encoder(crop[None], Mask(token=rearrange(mask, "(h w) -> 1 h w", h=grid[0])))
        if not mask.any():
            continue
        with torch.no_grad():
            said = method.teacher[head](method.teacher["encoder"](crop[None]).tokens[0, mask])
            target = ((said - method.patch_center) / method.teacher_temperature(0)).softmax(dim=-1)
        student = getattr(method, head)(seen.tokens[0, mask]) / 0.1
        losses.append(-(target * student.log_softmax(dim=-1)).sum(dim=-1).mean())
    torch.testing.assert_close(result["ibot"], torch.stack(losses).sum() / len(wide), rtol=1e-5, atol=1e-6)
    result["loss"].backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    other = {**batch, "global_patches": batch["global_patches"].clone()}  # what is hidden, the student never sees
    other["global_patches"][batch["token_mask"]] = 0
    seen, again = (
        method.encoder(method.packed(each), PackedMask(token=each["token_mask"])).tokens for each in (batch, other)
    )
    torch.testing.assert_close(seen, again)


def test_hog_of_images_at_their_own_shape_is_hog_image_by_image(shapes: Path, tmp_path: Path) -> None:
    given = data("mim", shapes, tmp_path, encoder={"patch": 8})
    given["views"]["global_crops"] = [{**NATIVE, "patch": 8, "max_tokens": 12}]
    given["method"] = {"name": "mim", "target": "hog", "mask": {"ratio": 0.5, "unit": 8}}
    config = parse_config(given)
    method, batch = build(config).train(), batch_of(config)
    loss = method(batch, 0)["loss"]
    images = method.packed(batch)
    masks = batch["token_mask"].split(list(images.lengths))
    raw = one_by_one(PackedImages(batch["global_patches"], images.grids), 8)
    errors = []
    for pixels, image, grid, hidden in zip(raw, one_by_one(images, 8), images.grids, masks, strict=True):
        seen = method.encoder(image[None], Mask(token=rearrange(hidden, "(h w) -> 1 h w", h=grid[0])))
        wanted = rearrange(oriented_gradients(pixels[None]), "1 c h w o -> (h w) (c o)")[hidden]
        errors.append((method.head(seen.tokens)[0, hidden] - wanted).square().mean(dim=1))
    torch.testing.assert_close(loss, torch.cat(errors).mean(), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["dino", "mae", "mim"])
def test_a_run_resumes_and_exports(kind: str, shapes: Path, tmp_path: Path) -> None:
    given = data(kind, shapes, tmp_path / "runs", encoder={"drop_path": 0.2, "token_drop": 0.3 * (kind == "dino")})
    given["tracking"] = {**given["tracking"], "pictures_every_steps": 1}
    run = finish(given, tmp_path, "encoder")
    assert (run / "encoder" / "config.json").is_file()
    assert list(run.glob("pictures/*"))


@pytest.mark.parametrize("method", [{}, {"ibot": {"masked_share": 0.7}}], ids=["dino", "ibot"])
def test_accumulation_changes_nothing(method: dict[str, Any], shapes: Path, tmp_path: Path) -> None:
    losses = []
    for accum in (1, 2):
        given = data("dino", shapes, tmp_path / str(accum), encoder={"drop_path": 0.3}, method=method)
        given["train"] |= {"grad_accum_steps": accum}
        rows = (pretrain(parse_config(given)) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([(json.loads(row)["loss"], json.loads(row)["ids_digest"]) for row in rows])
    for (one, first), (other, second) in zip(*losses, strict=True):
        assert first == second
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.slow  # square crops are killed by default
def test_kill_9_and_on_with_another_number_of_ranks(shapes: Path, tmp_path: Path) -> None:
    """Crops, masks and losses are those of a run that nobody killed, which two ranks made from the beginning."""
    quiet, killed = (
        data("dino", shapes, tmp_path, encoder={"drop_path": 0.2, "token_drop": 0.0}, method={"ibot": {}})
        | {"name": name, "train": {"steps": 16, "batch_size": 8}, "checkpoint": {"every_steps": 3}}
        for name in ("quiet", "killed")
    )
    path, log = tmp_path / "killed.json", tmp_path / "killed" / "metrics.jsonl"
    path.write_text(json.dumps([killed]))
    checkpoints = CheckpointFolder(tmp_path / "killed", parse_config(killed).checkpoint)
    worker = Path(__file__).parent / "worker.py"
    process = subprocess.Popen(
        [sys.executable, str(worker), str(path)], stdout=subprocess.DEVNULL, env=OF_THIS_CHECKOUT
    )
    try:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= 4 and checkpoints.all()):
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert "continuing from" in run_all([killed, quiet], 2, tmp_path)
    assert column(killed, "step") == column(quiet, "step") == list(range(1, 17))
    assert column(killed, "ids_digest") == column(quiet, "ids_digest")
    for name in ("loss", "ibot"):
        assert column(killed, name) == pytest.approx(column(quiet, name), rel=2e-3), name


def test_pictures_show_the_crops(shapes: Path, tmp_path: Path) -> None:
    config = parse_config(data("dino", shapes, tmp_path))
    batch = batch_of(config)
    shown = canvases(batch, 3, 4)
    crop = one_by_one(PackedImages(batch["global_patches"], build(config).packed(batch).grids))[5]  # view 1 of row 1
    assert torch.equal(shown["global_crops"][1, 1, :, : crop.shape[1], : crop.shape[2]], crop)
    assert shown["local_crops"].shape[:3] == (4, 2, 3)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"encoder": {"family": "vit", "stem": "conv"}}, "encoder vit takes no crops of their own shape"),
        ({"encoder": {"patch": 8}}, "cut into patches of 4 px and the encoder's are 8"),
        ({"engine": {"compile": True}}, "set engine.compile=false"),
        ({"data": {"backend": "device"}}, "set data.backend=auto"),
        ({"method": {"gram": {}}}, "method dino as it is set takes no crops.*set method.gram=null"),
        ({"method": {"ibot": {"unit": 8}}}, r"method\.ibot\.unit is 8 px; with shape=native it is one patch"),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(data("dino", tmp_path, tmp_path, **sections))


def test_a_bound_on_the_tokens_of_a_micro_batch(tmp_path: Path) -> None:
    given = data("dino", tmp_path, tmp_path, train={"max_tokens": 128})
    with pytest.raises(ValueError, match=r"4 rows may have 256 patches, 64 a row, and train\.max_tokens is 128"):
        check_batch(parse_config(given), 1)
    check_batch(parse_config(given), 2)
    given["train"]["grad_accum_steps"] = 2
    check_batch(parse_config(given), 1)
