"""HorNet: gated convolutions and global filters against the paper's formulas in loops, and what a pyramid promises."""

from __future__ import annotations

import cmath
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_import import imported
from torch import Tensor, nn

from pretrain.encoders import Encoder, build_encoder
from pretrain.encoders.base import Mask
from pretrain.encoders.hornet.config import HorNetConfig
from pretrain.encoders.hornet.gated import GatedConvolution, GlobalFilter
from pretrain.encoders.saved import load_encoder

STAGES: dict[str, Any] = {"dim": 8, "depths": (1, 2, 1), "orders": (2, 3, 4), "patch": 4}
CONFIGS = {
    "local": HorNetConfig(**STAGES),
    "global": HorNetConfig(**STAGES, filter="global", filters=((4, 3), (2, 2))),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> HorNetConfig:
    return CONFIGS[request.param]


def make(config: HorNetConfig, size: tuple[int, int] = (64, 64)) -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(config, size, mask_token=True).eval()
    return spread(encoder)


def spread(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        parameter.data += (0.5 if "gamma" in name else 0.2) * torch.randn(parameter.shape, generator=generator)
    return module


def images(size: tuple[int, int] = (64, 64), seed: int = 0) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def around(convolution: nn.Conv2d, cells: Tensor, row: int, column: int) -> Tensor:
    """A depth-wise convolution at one place of a map (h, w, d), zero beyond its borders."""
    side = convolution.kernel_size[0]
    value = cells.new_zeros(cells.shape[-1]) if convolution.bias is None else convolution.bias
    for y in range(side):
        for x in range(side):
            at = (row + y - side // 2, column + x - side // 2)
            if 0 <= at[0] < cells.shape[0] and 0 <= at[1] < cells.shape[1]:
                value = value + convolution.weight[:, 0, y, x] * cells[at]
    return value


def test_gated_convolution_is_the_papers() -> None:
    """Equations 3.3 to 3.5, place by place: values and gradients."""
    torch.manual_seed(0)
    gated = GatedConvolution(8, 3, 1 / 3, None).double()
    cells = torch.randn(1, 4, 5, 8, dtype=torch.float64, requires_grad=True)
    matrices = {name: part.weight[:, :, 0, 0] for name, part in gated.named_modules() if hasattr(part, "weight")}
    entered = cells[0] @ matrices["proj_in"].T + gated.proj_in.bias
    widths = (2, 4, 8)  # C / 2^(n - k - 1)
    out = []
    for row in range(4):
        for column in range(5):
            gates = around(gated.dwconv, entered[..., 2:], row, column) / 3
            p = entered[row, column, :2]
            for order, width in enumerate(widths):
                gate = gates[sum(widths[:order]) :][:width]
                p = gate * (p if order == 0 else matrices[f"pws.{order - 1}"] @ p + gated.pws[order - 1].bias)
            out.append(matrices["proj_out"] @ p + gated.proj_out.bias)
    slow = torch.stack(out).view(1, 4, 5, 8)
    fast = gated(cells)
    torch.testing.assert_close(fast, slow)
    inputs = [cells, *gated.parameters()]
    weights = torch.randn_like(slow)
    for own, other in zip(
        torch.autograd.grad((fast * weights).sum(), inputs),
        torch.autograd.grad((slow * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


def filtered(cells: Tensor, weight: Tensor) -> Tensor:
    """A map (h, w) times a filter (h, w // 2 + 1, 2) of its frequencies, by the sums of Fourier's transform."""
    height, width = cells.shape
    out = cells.new_zeros(height, width)
    for u in range(height):
        for v in range(width // 2 + 1):
            twice = 1 if v in (0, width / 2) else 2  # a real map's other half is the conjugate
            wave = [
                [cmath.exp(-2j * math.pi * (u * y / height + v * x / width)) for x in range(width)]
                for y in range(height)
            ]
            waves = torch.tensor(wave)
            coefficient = (cells * waves).sum() * torch.complex(weight[u, v, 0], weight[u, v, 1])
            out = out + twice * (coefficient * waves.conj()).real / (height * width)
    return out


def resized(table: Tensor, height: int, width: int) -> Tensor:
    """A table (h, w, 2), linearly between its nearest entries; corners stay corners."""
    out = table.new_zeros(height, width, 2)
    for row in range(height):
        for column in range(width):
            y = row * (table.shape[0] - 1) / max(height - 1, 1)
            x = column * (table.shape[1] - 1) / max(width - 1, 1)
            for i in {math.floor(y), math.ceil(y)}:
                for j in {math.floor(x), math.ceil(x)}:
                    out[row, column] += (1 - abs(y - i)) * (1 - abs(x - j)) * table[i, j]
    return out


@pytest.mark.parametrize("frequencies", [(4, 4), (3, 2)])
def test_global_filter_is_a_product_of_frequencies(frequencies: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = spread(GlobalFilter(6, frequencies))
    cells = torch.randn(1, 4, 6, 6, requires_grad=True)
    normed = module.pre_norm(cells[0])
    out: list[Tensor] = []
    for channel in range(3):
        near = [around(module.dw, normed[..., :3], row, column)[channel] for row in range(4) for column in range(6)]
        far = filtered(normed[..., 3 + channel], resized(module.complex_weight[channel], 4, 4))
        out += [torch.stack(near).view(4, 6), far]
    slow = module.post_norm(torch.stack(out, dim=-1))
    fast = module(cells)[0]
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    inputs = [cells, *module.parameters()]
    weights = torch.randn_like(slow)
    for own, other in zip(
        torch.autograd.grad((fast * weights).sum(), inputs),
        torch.autograd.grad((slow * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)


def test_a_filter_of_ones_changes_nothing_on_maps_of_any_size() -> None:
    module = GlobalFilter(4, (14, 8))
    module.complex_weight.data[..., 0], module.complex_weight.data[..., 1] = 1.0, 0.0
    for size in ((14, 14), (7, 5), (1, 1), (2, 9)):
        cells = torch.randn(1, *size, 2)
        torch.testing.assert_close(module._filtered(cells), cells)


def test_published_sizes() -> None:
    # M parameters (tables 2 and 10), head included
    published = {("tiny", "local"): 22, ("tiny", "global"): 23, ("large", "global"): 196}
    for (size, kind), millions in published.items():
        with torch.device("meta"):
            encoder = build_encoder(HorNetConfig(size=size, filter=kind), (224, 224))  # type: ignore[arg-type]
        count = sum(parameter.numel() for parameter in encoder.parameters()) + encoder.dim * 1000 + 1000
        assert count / 1e6 == pytest.approx(millions, abs=1), (size, kind)


def test_each_token_names_its_units(config: HorNetConfig) -> None:
    """Without gated convolutions a token stands alone: what moves it are the pixels of its own units."""
    encoder = make(config)
    for block in encoder.blocks():
        nn.init.zeros_(block.gamma1)
    hidden = torch.ones(2, 4, 4, dtype=torch.bool)
    hidden[:, 1::2, ::2] = False
    features = encoder(images(), Mask(drop=hidden))
    assert features.ids_keep is not None
    assert not hidden[0].flatten()[features.ids_keep[0].flatten()].any()
    for token, (unit,) in enumerate(features.ids_keep[0].tolist()):
        top, left = (16 * side for side in divmod(unit, 4))
        changed = images()
        changed[0, :, top : top + 16, left : left + 16] += torch.randn(3, 16, 16)
        moved = (encoder(changed, Mask(drop=hidden)).tokens[0] - features.tokens[0]).abs().sum(dim=-1)
        assert moved[token] > 0
        assert moved.sum() == moved[token]


def test_pooled_is_the_norm_of_the_mean_at_any_size(config: HorNetConfig) -> None:
    encoder = make(config)
    for size in ((64, 64), (32, 48), (16, 16)):
        last, _ = encoder.run(encoder.embed(images(size)), None, set())
        features = encoder(images(size), layers=(-1, 0))
        assert features.grid == (size[0] // 16, size[1] // 16)
        torch.testing.assert_close(features.pooled, encoder.final_norm(last.mean(dim=(1, 2))))
        torch.testing.assert_close(features.layers[0].pooled, features.pooled)
        assert features.layers[1].tokens.shape == (2, 16 * len(features.tokens[0]), 8)


def test_layers_rise_from_the_embedding_to_the_norm(config: HorNetConfig) -> None:
    encoder = make(config)
    layers = {name: encoder.layer_of(f"encoder.{name}") for name, _ in encoder.named_parameters()}
    assert (min(layers.values()), max(layers.values())) == (0, encoder.depth + 1)
    assert layers["mask_token"] == 0
    assert layers["hornet.downsample_layers.1.1.weight"] == 2
    for number, block in enumerate(encoder.blocks()):
        inside = {id(parameter) for parameter in block.parameters()}
        assert {layers[name] for name, p in encoder.named_parameters() if id(p) in inside} == {number + 1}


def test_official_checkpoints_are_imported(config: HorNetConfig, tmp_path: Path) -> None:
    encoder = make(config)
    head = {"head.weight": torch.randn(3, 32), "head.bias": torch.randn(3)}
    found = imported({"model": dict(encoder.inner().state_dict()) | head}, "hornet", tmp_path)
    assert found.encoder.shape == config.shape
    assert (found.encoder.orders, found.encoder.stage_filters) == (config.orders, config.stage_filters)
    assert found.left == dict.fromkeys(head, "a classifier's")
    assert found.image_size == ((32, 32) if config.filter == "global" else (224, 224))
    loaded, card = load_encoder(tmp_path / "out")
    assert card.headline is None
    torch.testing.assert_close(loaded(images()).pooled, encoder(images()).pooled)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orders": (2, 3)}, "depths .* name 4 stages and orders .* name 2; set both"),
        ({"dim": 6, "filter": "global"}, "stage 2 is 24 wide; with order 4 and a global filter .* a multiple of 16"),
        ({"depths": (1,), "orders": (2,), "filter": "global"}, "are of 2 stages, and there are 1"),
    ],
)
def test_shapes_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HorNetConfig(**settings)
