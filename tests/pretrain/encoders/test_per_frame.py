"""Any encoder on stacks, frame by frame, against the slow form: each frame for itself, then the mean."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from tiny import build, config_data, random_batch
from torch import Tensor

from pretrain.config.load import ConfigError, parse_config
from pretrain.encoders import build_encoder, drop_path
from pretrain.encoders.base import Encoder, Features, Mask
from pretrain.encoders.per_frame import per_frame
from pretrain.encoders.pvt.config import PvtConfig
from pretrain.encoders.saved import EncoderCard, load_encoder, save_encoder
from pretrain.encoders.vit.config import VitConfig

FRAMES, CHANNELS = 3, 2
VIT = VitConfig(dim=16, depth=2, heads=2, patch=16, drop_path=0.3)
PVT = PvtConfig(dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), heads=(1, 1, 1, 1))


def both(config: Any, size: tuple[int, int] = (32, 64)) -> tuple[Encoder, Encoder]:
    torch.manual_seed(0)
    encoder = build_encoder(config, size, CHANNELS, mask_token=True).eval()
    return encoder, per_frame(copy.deepcopy(encoder), CHANNELS)


def stacks(size: tuple[int, int] = (32, 64), count: int = 2) -> Tensor:
    return torch.randn(count, FRAMES * CHANNELS, *size, generator=torch.Generator().manual_seed(1))


def slowly(encoder: Encoder, images: Tensor, mask: Mask | None, layers: tuple[int, ...]) -> list[Features]:
    frames = images.split(CHANNELS, dim=1)
    return [encoder(frame, mask, layers) for frame in frames]


@pytest.mark.parametrize("config", [VIT, PVT], ids=["vit", "pvt"])
@pytest.mark.parametrize("hidden", [None, "token", "drop"])
def test_features_are_the_means_of_the_frames(config: Any, hidden: str | None) -> None:
    encoder, ours = both(config)
    images, mask = stacks((64, 128)), None
    if hidden is not None:
        quad = torch.tensor([[True, True], [True, False]]).repeat(1, 2)[None].expand(2, -1, -1)
        mask = Mask(**{hidden: quad})
    found = ours(images, mask, (0,))
    parts = slowly(encoder, images, mask, (0,))
    for name in ("tokens", "pooled", "prefix_tokens", "states"):
        own, theirs = getattr(found, name), [getattr(part, name) for part in parts]
        assert (own is None) == (theirs[0] is None)
        if own is not None:
            torch.testing.assert_close(own, torch.stack(theirs).mean(dim=0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.layers[0].tokens, torch.stack([part.layers[0].tokens for part in parts]).mean(dim=0), rtol=1e-5, atol=1e-5
    )
    assert found.grid == parts[0].grid
    assert found.ids_keep is None or torch.equal(found.ids_keep, parts[0].ids_keep)  # type: ignore[arg-type]


def test_one_frame_is_an_image_and_several_batches_go_in_one_pass() -> None:
    encoder, ours = both(VIT)
    image, small = stacks()[:, :CHANNELS], stacks((16, 16))
    assert torch.equal(ours(image).pooled, encoder(image).pooled)
    assert ours.packs
    packed = ours((stacks(), small), (None, None))
    torch.testing.assert_close(packed[0].pooled, ours(stacks()).pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[1].tokens, ours(small).tokens, rtol=1e-5, atol=1e-5)
    assert ours.state_dict().keys() == encoder.state_dict().keys()
    assert type(copy.deepcopy(ours)) is type(ours)


def test_paths_are_dropped_by_row_of_the_batch() -> None:
    _, ours = both(VIT)
    images = stacks(count=6)
    with drop_path.drawn(0, 0, torch.arange(6)):
        together = ours.train()(images).pooled
    with drop_path.drawn(0, 0, torch.arange(3, 6)):
        torch.testing.assert_close(ours(images[3:]).pooled, together[3:], rtol=1e-5, atol=1e-5)


def config_of(method: str, encoder: dict[str, Any] | None = None, **data: Any) -> Any:
    found = config_data(method, "vit", Path("nowhere"), Path("nowhere"), data={"frames": FRAMES, **data})
    if encoder is not None:
        found["encoder"] = encoder
        for crop in found["views"]["global_crops"]:
            crop["size"] = 32
        if "mask" in found["method"]:
            found["method"]["mask"] = {**found["method"]["mask"], "unit": encoder.get("patch", 16)}
    return parse_config(found)


TIMESFORMER = {"family": "timesformer", "dim": 16, "depth": 1, "heads": 2, "patch": 8, "frames": FRAMES}


@pytest.mark.parametrize("method", ["mae", "mim", "dino"])
@pytest.mark.parametrize("encoder", [None, TIMESFORMER], ids=["vit", "timesformer"])
def test_methods_learn_from_stacks(method: str, encoder: dict[str, Any] | None) -> None:
    config = config_of(method, encoder)
    batch = random_batch(config)
    assert batch["global_crops"].shape[2] == 3 * FRAMES
    trained = build(config).train()
    loss = trained(batch, 0)["loss"]
    loss.backward()
    assert loss.isfinite()
    reached = {name for name, parameter in trained.encoder.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in trained.encoder.named_parameters()}
    other = {**batch, "global_crops": batch["global_crops"].clone()}
    other["global_crops"][:, :, -3:] = 0  # the last frame counts
    assert not torch.equal(build(config)(other, 0)["loss"], build(config)(batch, 0)["loss"])
    with torch.no_grad():
        for name, pictures in trained.eval().pictures(batch).items():
            assert pictures.shape[:2] == (4, 3), name
            assert pictures.shape[3] >= FRAMES * 32, name


def test_pixels_of_every_frame_are_normalised_by_the_channels_statistics() -> None:
    method = build(config_of("mae"))
    crops = random_batch(config_of("mae"))["global_crops"][:, 0]
    frames = [method.normalise(frame) for frame in crops.split(3, dim=1)]
    assert torch.equal(method.normalise(crops), torch.cat(frames, dim=1))
    assert torch.equal(method.show(crops), torch.cat(list(crops.split(3, dim=1)), dim=-1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: config_of("mae", TIMESFORMER, frames=2), "data.frames is 2 and encoder.frames is 3"),
        (lambda: config_of("mae", backend="device"), "data.backend=device does the colours of images"),
        (lambda: config_of("dvae"), "dvae takes single images"),
        (lambda: config_of("finetune"), "finetune takes single images"),
        (lambda: config_of("mae", frames=1, frame_stride=2), "frame_stride is 2 and frames is 1"),
    ],
)
def test_what_does_not_go_with_stacks_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_an_encoder_of_stacks_is_loaded_as_one(tmp_path: Path) -> None:
    config = config_of("dino")
    method = build(config)
    assert method.encoder is not None
    card = EncoderCard(
        encoder=config.encoder, image_size=(32, 32), channels=3, frames=FRAMES, mean=(0.5,) * 3, std=(0.2,) * 3,
        method="dino", headline="class", step=1, epoch=1.0, run="r",
    )  # fmt: skip
    save_encoder(tmp_path / "encoder", method.encoder.state_dict(), card)
    loaded, read = load_encoder(tmp_path / "encoder")
    assert read.frames == FRAMES
    images = torch.randn(2, 3 * FRAMES, 32, 32)
    torch.testing.assert_close(loaded(images).pooled, method.encoder.eval()(images).pooled)
    frames = [loaded(frame).pooled for frame in rearrange(images, "b (t c) h w -> t b c h w", c=3)]
    torch.testing.assert_close(loaded(images).pooled, torch.stack(frames).mean(dim=0), rtol=1e-5, atol=1e-5)
