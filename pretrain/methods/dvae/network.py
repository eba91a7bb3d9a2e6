"""The networks of the discrete variational autoencoder (Ramesh et al. 2021, appendix A; DALL-E's architecture)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from pretrain.engines.precision import exactly
from pretrain.methods.dvae.config import DvaeConfig
from pretrain.stream.pixels import unit_range
from pretrain.tokenizers.card import TokenizerCard

#: The logit-Laplace distribution lives on the open interval (0, 1): pixels keep this distance from its ends.
MARGIN = 0.1
#: Width of the decoder's first layer.
DECODER_START = 128


def map_pixels(crops: Tensor) -> Tensor:
    """uint8 or uint16 pixels to .1 .. .9."""
    return (1 - 2 * MARGIN) * unit_range(crops) + MARGIN


def unmap_pixels(mapped: Tensor) -> Tensor:
    """Back from there to 0 .. 1."""
    return (mapped - MARGIN) / (1 - 2 * MARGIN)


class DvaeEncoder(nn.Module):
    """Images to logits over the vocabulary, on a map of `stride` px.

    Residual blocks at `groups` resolutions, each twice as wide and half as high as the one before.
    """

    def __init__(self, config: DvaeConfig, channels: int) -> None:
        super().__init__()
        self.vocab_size, self.stride = config.vocab_size, 2 ** (config.groups - 1)
        gain = 1 / (config.groups * config.blocks_per_group) ** 2
        width = config.hidden
        layers: list[nn.Module] = [_conv(channels, width, 7)]
        for group in range(config.groups):
            if group:
                layers.append(nn.MaxPool2d(2))
            for _ in range(config.blocks_per_group):
                layers.append(Residual(width, config.hidden * 2**group, (3, 3, 3, 1), gain))
                width = config.hidden * 2**group
        self.layers = nn.Sequential(*layers, nn.ReLU(), _conv(width, config.vocab_size, 1))
        self.register_buffer("shift", torch.zeros(config.vocab_size))  # of the logits; see `spread`
        if config.start == "spread":
            self.spread()

    def forward(self, mapped: Tensor) -> Tensor:
        """Pixels of `map_pixels` (b, c, h, w) to logits (b, k, h / stride, w / stride)."""
        return self.layers(mapped) - rearrange(self.shift, "k -> k 1 1")

    @torch.no_grad()
    def spread(self) -> None:
        """Begin with logits that differ between places by about 3: pixels centred and of deviation 1 or so, and a
        larger last layer. What all places have in common is the `shift`, to be set from the first batch."""
        first, last = self.layers[0], self.layers[-1]
        first.weight.mul_(4)
        first.bias.copy_(-0.5 * reduce(first.weight, "o i h w -> o", "sum"))
        last.weight.mul_(6)


class DvaeDecoder(nn.Module):
    """Shares of the codes on a map to a distribution of pixels: the encoder mirrored, with nearest upsampling."""

    def __init__(self, config: DvaeConfig, channels: int) -> None:
        super().__init__()
        gain = 1 / (config.groups * config.blocks_per_group) ** 2
        width = DECODER_START
        layers: list[nn.Module] = [_conv(config.vocab_size, width, 1)]
        for group in reversed(range(config.groups)):
            for _ in range(config.blocks_per_group):
                layers.append(Residual(width, config.hidden * 2**group, (1, 3, 3, 3), gain))
                width = config.hidden * 2**group
            if group:
                layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.layers = nn.Sequential(*layers, nn.ReLU(), _conv(width, 2 * channels, 1))

    def forward(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """(b, k, h, w) to the location, before the sigmoid, and the log of the scale of each pixel (b, c, H, W)."""
        location, log_scale = self.layers(shares).float().chunk(2, dim=1)
        return location, log_scale


class Residual(nn.Module):
    """Identity (or a 1x1 convolution between widths) plus `gain` times four convolutions on a quarter of the width."""

    def __init__(self, width: int, width_out: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        inner = max(width_out // 4, 1)
        widths = [width, inner, inner, inner, width_out]
        layers: list[nn.Module] = []
        for position, kernel in enumerate(kernels):
            layers += [nn.ReLU(), _conv(widths[position], widths[position + 1], kernel)]
        self.branch = nn.Sequential(*layers)
        self.shortcut = _conv(width, width_out, 1) if width != width_out else nn.Identity()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """(b, width, h, w) -> (b, width_out, h, w)."""
        return self.shortcut(x) + self.gain * self.branch(x)


def residuals(network: nn.Module) -> list[nn.Module]:
    """The residual blocks of an encoder or decoder, in order."""
    return [layer for layer in network.layers if isinstance(layer, Residual)]


def _conv(width: int, width_out: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the map's size, its weights N(0, 1 / fan-in) and its bias zero."""
    conv = nn.Conv2d(width, width_out, kernel, padding=kernel // 2)
    nn.init.normal_(conv.weight, std=(width * kernel**2) ** -0.5)
    nn.init.zeros_(conv.bias)
    return conv


def logit_laplace(mapped: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
    """Negative log likelihood of pixels in (0, 1) whose logit is Laplace-distributed (Ramesh et al. 2021, A.3)."""
    density = torch.log(2 * mapped * (1 - mapped)) + log_scale
    return density + (torch.logit(mapped) - location).abs() * torch.exp(-log_scale)


def divergence_to_uniform(logits: Tensor) -> Tensor:
    """KL divergence () of the codes' distribution (b, k, h, w) from the uniform one, per position, in nats."""
    log_shares = F.log_softmax(logits, dim=1)
    log_uniform = -math.log(logits.shape[1])
    return (log_shares.exp() * (log_shares - log_uniform)).sum(dim=1).mean()


class DvaeTokenizer(nn.Module):
    """A trained encoder as a tokenizer: `vocabulary` codes on a map of `stride` px."""

    def __init__(self, encoder: DvaeEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.vocab_size, self.stride = encoder.vocab_size, encoder.stride

    def forward(self, crops: Tensor) -> Tensor:
        """Crops (b, c, h, w) uint8 or uint16 to codes (b, h / stride, w / stride) int64."""
        *body, last = self.encoder.layers
        hidden = map_pixels(crops)
        for layer in body:
            hidden = layer(hidden)
        with exactly(crops.device):  # in bf16 many of the largest logits are equal, and the first of them would win
            logits = last(hidden.float())
        return (logits - rearrange(self.encoder.shift, "k -> k 1 1")).argmax(dim=1)

    def blocks(self) -> list[nn.Module]:
        """What is compiled."""
        return residuals(self.encoder)


def empty_tokenizer(card: TokenizerCard) -> DvaeTokenizer:
    """What takes the weights of the tokenizer that `card` describes."""
    return DvaeTokenizer(DvaeEncoder(card.method, card.channels))
