"""Any timm model behind the Encoder seam."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from pretrain.encoders import build_encoder
from pretrain.encoders.base import Mask, refine
from pretrain.encoders.timm.config import SPEC, TimmConfig
from pretrain.encoders.timm.embeddings import at_centres, map_of, replaced
from pretrain.encoders.timm.encoder import TimmEncoder
from pretrain.encoders.timm.survey import survey
from pretrain.engines.ema import running_statistics
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Normalisation
from pretrain.methods.dino.config import DinoConfig
from pretrain.methods.dino.method import Dino

#: Small forms of the rows of the table: vit has (b, h, w, d), cait (b, n, d), convnext (b, d, h, w), coatnet batch
#: norm, hiera overlapping patches, crossvit two branches; mvit gives (tokens, size).
SMALL: dict[str, dict[str, Any]] = {example.settings["model"]: example.small["args"] for example in SPEC.examples}
SMALL["vit_tiny_patch16_224"] = {"depth": 2, "embed_dim": 32, "num_heads": 2}
SIDES = {"crossvit_9_240": 120, "levit_128s": 128}
MASKABLE = [name for name in SMALL if name not in ("focalnet_tiny_srf", "mobilevitv2_050", "resnet50")] + [
    "mvitv2_tiny"
]
SQUARE = ("hiera_tiny_224", "mvitv2_tiny", "levit_128s")  # timm's own form of a wide image is another map


def side_of(name: str) -> int:
    return SIDES.get(name, 64)


def unit_map(name: str, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Which mask units are hidden, half of them: (b, gh, gw) of units of 16 px, 24 of CrossViT, 32 of a Mixer/32."""
    unit = {"crossvit_9_240": 24, "mixer_s32_224": 32}.get(name, 16)
    drawn = torch.rand(2, size[0] // unit * (size[1] // unit), generator=torch.Generator().manual_seed(seed))
    order = drawn.argsort(dim=1).argsort(dim=1)
    return (order < order.shape[1] // 2).unflatten(1, (size[0] // unit, size[1] // unit))


def make(name: str, size: tuple[int, int] = (64, 64), mask_token: bool = True, **fields: Any) -> TimmEncoder:
    torch.manual_seed(0)
    args = fields.pop("args", SMALL.get(name, {}))
    encoder = build_encoder(TimmConfig(model=name, args=args, **fields), size, 3, mask_token)
    assert isinstance(encoder, TimmEncoder)
    return encoder.eval()


def images(size: tuple[int, int] = (64, 64), seed: int = 0) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MASKABLE)
def test_hidden_pixels_change_nothing(name: str) -> None:
    """In evaluation and in training, where batch normalisation sees all images: hidden pixels are zero for it too."""
    side = side_of(name)
    size = (side, side) if name in SQUARE else (side, 2 * side)
    encoder = make(name, size)
    hidden = unit_map(name, size)
    pixels = refine(hidden, size)[:, None]
    other = torch.where(pixels, images(size, 1), images(size))
    for training in (False, True):
        first, second = (encoder.train(training)(given, Mask(token=hidden)) for given in (images(size), other))
        assert torch.equal(first.tokens, second.tokens)
        assert torch.equal(first.pooled, second.pooled)
    shown = encoder(torch.where(pixels, images(size), images(size, 1)), Mask(token=hidden))
    assert not torch.allclose(first.tokens, shown.tokens)
    assert encoder.mask_token is not None
    parts = encoder.mask_token.split([own.width for own in encoder.survey.embeddings])
    encoder.train()(images(size), Mask(token=hidden)).tokens.square().sum().backward()
    assert encoder.mask_token.grad is not None
    for gradient in encoder.mask_token.grad.split([len(part) for part in parts]):
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", MASKABLE)
def test_an_unmasked_image_is_timms(name: str) -> None:
    size = (side_of(name),) * 2
    encoder = make(name, size)
    features = encoder(images(size))
    assert features.grid == (size[0] // encoder.stride, size[1] // encoder.stride)
    assert features.tokens.shape == (2, features.grid[0] * features.grid[1], encoder.dim)
    theirs = timm.create_model(name, num_classes=0, **encoder.survey.arguments).eval()
    theirs.load_state_dict(encoder.model.state_dict())
    tolerance = 1e-5 if name.startswith("convit") else 0.0  # whose attention is ours
    torch.testing.assert_close(features.pooled, theirs(images(size)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "cait_xxs24_224", "coatnet_0_rw_224", "mvitv2_tiny"])
def test_the_mask_token_stands_where_the_units_are(name: str) -> None:
    """With one unit hidden in the raster's third place, the embedded tokens there are the mask token."""
    encoder = make(name)
    hidden = torch.zeros(2, 4, 4, dtype=torch.bool)
    hidden[:, 0, 2] = True
    seen: list[Any] = []
    own = encoder.survey.embeddings[0]
    with replaced(encoder.model, encoder.survey.embeddings, hidden, encoder.mask_token, (64, 64)):
        after = encoder.model.get_submodule(own.name)
        handle = after.register_forward_hook(lambda _, __, output: seen.append(output))
        encoder.model.forward_features(images())
        handle.remove()
    given = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    side = 64 // encoder.patch
    if own.order == "channels rows columns":
        given = given.permute(0, 2, 3, 1)
    cells = given.reshape(2, side, side, -1)
    is_token = (cells == encoder.mask_token).all(dim=-1)
    assert torch.equal(is_token, refine(hidden, (side, side)))


def test_both_branches_of_crossvit_are_masked_alike() -> None:
    """Tokens of 12 px of 120 and of 16 px of the same at 112: those whose centre lies in a hidden unit."""
    encoder = make("crossvit_9_240", (120, 120))
    assert [own.grid for own in encoder.survey.embeddings] == [(10, 10), (7, 7)]
    hidden = unit_map("crossvit_9_240", (120, 120))
    for rows in (10, 7):
        found = at_centres(hidden, (rows, rows))
        for row in range(rows):
            for column in range(rows):
                unit = [int((place + 0.5) / rows * 120) // 24 for place in (row, column)]
                assert torch.equal(found[:, row, column], hidden[:, unit[0], unit[1]])
    features = encoder(images((120, 120)))
    model = encoder.model
    branches = [norm(part) for norm, part in zip(model.norm, model.forward_features(images((120, 120))), strict=True)]
    assert features.prefix_tokens is not None
    torch.testing.assert_close(features.prefix_tokens[:, 0], features.pooled)
    assert features.tokens.shape == (2, 100, sum(part.shape[-1] for part in branches))


def test_a_small_map_read_at_centres_is_the_refined_one() -> None:
    hidden = torch.rand(3, 2, 4) < 0.5
    assert torch.equal(at_centres(hidden, (6, 8)), refine(hidden, (6, 8)))


def test_sizes_and_shapes_are_found_without_weights() -> None:
    generator = torch.get_rng_state()
    found = survey(TimmConfig(model="resnet50"))
    assert torch.equal(generator, torch.get_rng_state())
    assert (found.image_size, found.stride, found.dim, found.grid) == ((224, 224), 32, 2048, (7, 7))
    assert found.unmaskable == "no single patch embedding"
    swin = survey(TimmConfig(model="swin_tiny_patch4_window7_224"), (64, 128), 1)
    assert (swin.grid, swin.stride, swin.patch, swin.channels) == ((2, 4), 32, 4, 1)
    crossvit = survey(TimmConfig(model="crossvit_9_240"))
    assert (crossvit.grid, crossvit.layout, crossvit.dim) == ((20, 20), "branches", 384)
    mobile = survey(TimmConfig(model="mobilenetv3_small_100"))
    assert (mobile.layout, mobile.dim) == ("none", 1024)


def test_maps_of_tokens() -> None:
    assert map_of(12, (48, 64)) == (3, 4)
    assert map_of(13, (48, 64)) is None
    assert map_of(0, (48, 64)) is None


def test_what_can_be_neither_dropped_nor_replaced() -> None:
    with pytest.raises(ValueError, match=r"takes whole images only \(its convolutions need the whole map\)"):
        make("convnext_tiny")(images(), Mask(drop=torch.ones(2, 2, 2, dtype=torch.bool)))
    with pytest.raises(ValueError, match="no single patch embedding"):
        make("resnet18")


def test_layers_of_equal_blocks() -> None:
    encoder = make("vit_tiny_patch16_224")
    assert len(encoder.blocks()) == encoder.depth == 2
    features = encoder(images((32, 96)), layers=(-1, 0))
    torch.testing.assert_close(features.layers[0].tokens, features.tokens)
    assert features.layers[1].prefix_tokens is not None
    assert not torch.allclose(features.layers[1].pooled, features.pooled)
    numbers = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert numbers["model.blocks.0.attn.qkv.weight"] == 1
    assert numbers["model.norm.weight"] == 3
    assert numbers["model.patch_embed.proj.weight"] == numbers["mask_token"] == numbers["model.cls_token"] == 0
    assert encoder.no_decay("encoder.model.pos_embed")
    cait = make("cait_xxs24_224")
    assert cait.blocks() == []
    with pytest.raises(ValueError, match="no earlier layers"):
        cait(images(), layers=(0,))


def test_layers_rise_where_there_are_no_equal_blocks() -> None:
    encoder = make("convnext_tiny")
    numbers = [encoder.layer_of(name) for name, _ in encoder.named_parameters()]
    assert min(numbers) == 0
    assert max(numbers) == encoder.depth + 1


def test_probing_by_name_needs_no_config() -> None:
    encoder = TimmEncoder("vit_tiny_patch16_224", pretrained=False, image_size=(96, 96)).eval()
    assert (encoder.image_size, encoder.channels) == ((96, 96), 3)
    assert len(encoder.mean) == len(encoder.std) == 3
    assert encoder.has_class_token
    assert encoder(images((96, 96))).tokens.shape == (2, 36, 192)


def test_drop_path_and_channels() -> None:
    encoder = build_encoder(TimmConfig(model="convnext_tiny", args=SMALL["convnext_tiny"], drop_path=0.5), (64, 64), 1)
    assert any(getattr(part, "drop_prob", 0) == 0.5 for part in encoder.modules())
    assert encoder(torch.zeros(1, 1, 64, 64)).pooled.shape == (1, 32)


@pytest.mark.parametrize("name", ["repvgg_a0", "levit_128s", "vit_tiny_patch16_224"])
def test_a_merged_encoder_computes_the_same_with_fewer_convolutions(name: str) -> None:
    """RepVGG's three branches, each with its batch normalisation, are one convolution with a bias."""
    size = (SIDES.get(name, 32),) * 2
    encoder = make(name, size, mask_token=False)
    generator = torch.Generator().manual_seed(2)
    for part in encoder.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):  # as training leaves them
            part.running_mean = torch.randn(part.num_features, generator=generator) * 0.1
            part.running_var = torch.rand(part.num_features, generator=generator) + 0.5
    merged = encoder.merged()
    with torch.no_grad():
        own, other = encoder(images(size)), merged(images(size))
    for first, second in ((own.tokens, other.tokens), (own.pooled, other.pooled)):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4 * float(first.abs().max()))
    count = [
        sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in each.modules()) for each in (encoder, merged)
    ]
    if name == "repvgg_a0":
        assert count[0] > 50
        assert count[1] == 0
    assert encoder.state_dict().keys() == make(name, size, mask_token=False).state_dict().keys()  # it stays as it was


def test_the_teachers_running_statistics_follow_the_students() -> None:
    """A teacher is never in training mode: without this its batch normalisation would keep the start's values."""
    config = DinoConfig(prototypes=8, head_hidden_dim=8, head_bottleneck_dim=4, teacher_momentum=0.5)
    size = (32, 32)
    encoders = [build_encoder(TimmConfig(model="resnet18", args={"layers": [1, 1, 1, 1]}), size, 3) for _ in range(2)]
    normalisation = Normalisation((0.5,) * 3, (0.2,) * 3)
    method = Dino(config, *encoders, normalisation, Timeline(100, 10.0))
    method.train()
    before = [statistic.clone() for statistic in running_statistics(method.teacher["encoder"])]
    method.encoder(images(size))
    method.after_step(0)
    student = running_statistics(method.encoder)
    weight = 1 - method.momentum(0)
    assert before
    for old, now, fast in zip(before, running_statistics(method.teacher["encoder"]), student, strict=True):
        torch.testing.assert_close(now, old + weight * (fast - old))
        assert not torch.equal(fast, old)


def test_names_and_arguments_that_are_wrong() -> None:
    with pytest.raises(ValueError, match=r"has no model .resnet1818.; the nearest names: .*resnet18"):
        make("resnet1818", mask_token=False)
    with pytest.raises(ValueError, match="does not run on images of 60x60 px"):
        make("vit_tiny_patch16_224", (60, 60), mask_token=False)
    assert isinstance(timm.create_model("resnet18", num_classes=0), nn.Module)
