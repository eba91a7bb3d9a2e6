"""Any timm model behind the Encoder seam (`timm:NAME`): probed as it is, or trained by what it can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from torch import Tensor, nn

from pretrain.encoders.base import Encoder, Features, Mask, refine, zero_hidden_pixels
from pretrain.encoders.timm.config import TimmConfig
from pretrain.encoders.timm.survey import check_name, create, map_of, outputs_of, survey

#: First parts of the names of what follows the last block.
AFTER_BLOCKS = ("norm", "fc_norm", "head", "final_conv", "conv_head")


class TimmEncoder(Encoder):
    """A timm model without its classifier (`self.model`). Its pooled feature is what timm gives to the classifier.

    Where timm's map of features has another width than its pooled feature, or there is no single map, the pooled
    feature is the only token. Replaced units' pixels are zeroed and their embedded tokens substituted, in models that
    embed the image once; none can leave units out. Batch normalisation, in models that have it, sees a micro-batch.

    Args:
        config: or just the model's name.
        image_size: h, w in px; default: what timm's configuration of the model says. So for `channels`.
        pretrained: load timm's weights, from the Hugging Face hub.

    Raises ValueError for a name timm does not know, naming the nearest ones, for arguments the model does not take,
    and for images it does not run on.
    """

    pixel_weights = ("patch_embed.proj.weight", "patch_embeds.0.proj.weight")
    has_square_grid = True
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        config: TimmConfig | str,
        image_size: tuple[int, int] | None = None,
        channels: int | None = None,
        mask_token: bool = False,
        *,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        config = TimmConfig(model=config) if isinstance(config, str) else config
        check_name(config.model)
        if pretrained:  # first, so that trouble with the weights is told as such
            self.model = create(config, image_size, channels, pretrained=True)[0]
        self.survey = survey(config, image_size, channels)
        if not pretrained:
            self.model = create(config, image_size, channels)[0]
        data = resolve_model_data_config(self.model)
        self.mean, self.std = tuple(data["mean"]), tuple(data["std"])
        self.image_size, self.channels = self.survey.image_size, self.survey.channels
        self.dim, self.stride, self.patch = self.survey.dim, self.survey.stride, self.survey.patch
        self.has_class_token = self.survey.num_prefix > 0
        self._layers = layers_of(self.model)
        self.depth = max(self._layers.values(), default=1) - 1
        self.mask_token = None
        if mask_token:
            if self.survey.unmaskable:
                raise ValueError(f"timm:{config.model} can't be trained by replacing tokens: {self.survey.unmaskable}")
            self.mask_token = nn.Parameter(torch.zeros(self.survey.width))
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask: Mask | None = None, layers: tuple[int, ...] = ()) -> Features:
        hidden = None
        if mask is not None:
            if mask.drop is not None:
                raise ValueError("a timm model takes whole images: units can be replaced, not dropped")
            hidden = mask.token
        if hidden is not None:
            assert self.mask_token is not None, "built without mask_token, so no unit can be replaced"
            images = zero_hidden_pixels(images, hidden)
        blocks = self.blocks()
        if layers and not blocks:
            raise ValueError(
                "this timm model has no blocks that all give what the last one gives, so no earlier layers"
            )
        wanted = {index: blocks[index] for index in layers}
        with self._replacing(hidden, (images.shape[2], images.shape[3])), outputs_of(wanted) as outputs:
            features = self._features(self.model.forward_features(images), images)
        earlier = tuple(self._features(self.final_norm(outputs[index][0]), images) for index in layers)
        return features._replace(layers=earlier)

    def _features(self, given: Any, images: Tensor) -> Features:
        pooled = self.model.forward_head(given, pre_logits=True)
        if self.survey.layout == "none":
            return Features(rearrange(pooled, "b d -> b 1 d"), None, None, None, pooled)
        if self.survey.layout == "sequence":
            count = self.survey.num_prefix
            prefix, tokens = given[:, :count] if count else None, given[:, count:]
            grid = map_of(tokens.shape[1], (images.shape[2], images.shape[3]))
            return Features(tokens, prefix, grid, None, pooled)
        cells = given if self.survey.layout == "rows columns channels" else rearrange(given, "b d h w -> b h w d")
        return Features(rearrange(cells, "b h w d -> b (h w) d"), None, tuple(cells.shape[1:3]), None, pooled)

    @contextmanager
    def _replacing(self, hidden: Tensor | None, size: tuple[int, int]) -> Iterator[None]:
        """While it lasts, the embedding's tokens at `hidden` units (b, gh, gw) of images of `size` px are the mask
        token."""
        if hidden is None:
            yield
            return
        grid = (size[0] // self.patch, size[1] // self.patch)
        at = refine(hidden, grid)
        pattern = {"sequence": "b (h w) 1", "rows columns channels": "b h w 1", "channels rows columns": "b 1 h w"}
        where = rearrange(at, f"b h w -> {pattern[self.survey.embedded_as]}")
        token = self.mask_token
        if self.survey.embedded_as == "channels rows columns":
            token = rearrange(token, "c -> c 1 1")

        def substitute(module: nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (substitute(module, inputs, output[0]), *output[1:])
            return torch.where(where, token.to(output.dtype), output)

        handle = self.model.get_submodule(self.survey.embedding).register_forward_hook(substitute)
        try:
            yield
        finally:
            handle.remove()

    def inner(self) -> nn.Module:
        return self.model

    def position_grid(self, key: str) -> tuple[int, int]:
        return self.image_size[0] // self.patch, self.image_size[1] // self.patch

    def final_norm(self, states: Tensor) -> Tensor:
        norm = getattr(self.model, "norm", None)
        return states if norm is None else norm(states)

    def blocks(self) -> list[nn.Module]:
        return list(self.model.blocks) if self.survey.uniform else []

    def layer_of(self, parameter_name: str) -> int:
        return self._layers.get(parameter_name.removeprefix("encoder.").removeprefix("model."), 0)

    def no_decay(self, parameter_name: str) -> bool:
        names = getattr(self.model, "no_weight_decay", set)()
        return parameter_name.removeprefix("encoder.").removeprefix("model.") in names


def layers_of(model: nn.Module) -> dict[str, int]:
    """Depth of every parameter by timm's own grouping: 0 for the embedding, then the blocks, one more after them.

    A model that timm does not group is one layer.
    """
    names = [name for name, _ in model.named_parameters()]
    if not hasattr(model, "group_matcher"):
        return dict.fromkeys(names, 1) | {"": 2}
    grouped = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    after = {name for name in names if name.split(".")[0] in AFTER_BLOCKS}
    inside = {name: layer for name, layer in grouped.items() if name not in after}
    top = max(inside.values(), default=0) + 1
    return inside | dict.fromkeys(after, top) | {"": top}
