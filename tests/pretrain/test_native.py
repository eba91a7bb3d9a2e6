"""Images at their own shape through a whole run: DINO in one packed pass, resumed, on any number of micro-batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import webdataset as wds
from einops import rearrange
from test_cells import finish
from tiny import build, config_data

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.loader import Batch
from pretrain.config import Config
from pretrain.config.load import check_batch, parse_config
from pretrain.encoders.native import PackedImages
from pretrain.encoders.patches import unpatchify
from pretrain.methods.dino.losses import dino_loss
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


@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_dino_in_one_pass_is_dino_crop_by_crop(pool: str, shapes: Path, tmp_path: Path) -> None:
    config = parse_config(data("dino", shapes, tmp_path, encoder={"pool": pool}))
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


def test_a_run_resumes_and_exports(shapes: Path, tmp_path: Path) -> None:
    given = data("dino", shapes, tmp_path / "runs", encoder={"drop_path": 0.2, "token_drop": 0.3})
    given["tracking"] = {**given["tracking"], "pictures_every_steps": 1}
    run = finish(given, tmp_path, "encoder")
    assert (run / "encoder" / "config.json").is_file()
    assert list(run.glob("pictures/*"))


def test_accumulation_changes_nothing(shapes: Path, tmp_path: Path) -> None:
    losses = []
    for accum in (1, 2):
        given = data("dino", shapes, tmp_path / str(accum), encoder={"drop_path": 0.3})
        given["train"] |= {"grad_accum_steps": accum}
        rows = (pretrain(parse_config(given)) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([(json.loads(row)["loss"], json.loads(row)["ids_digest"]) for row in rows])
    for (one, first), (other, second) in zip(*losses, strict=True):
        assert first == second
        assert one == pytest.approx(other, rel=1e-4)


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
        ({"encoder": {"family": "vit"}}, "encoder vit takes no crops of their own shape"),
        ({"encoder": {"patch": 8}}, "cut into patches of 4 px and the encoder's are 8"),
        ({"engine": {"compile": True}}, "set engine.compile=false"),
        ({"data": {"backend": "device"}}, "set data.backend=auto"),
        ({"method": {"ibot": {}}}, "method dino as it is set takes no crops"),
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
