"""Any timm model behind the Encoder seam (`timm:NAME`): probed as it is, or trained by what it can do."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from einops import rearrange
from timm.data import resolve_model_data_config
from timm.models import group_parameters, reparameterize_model
from torch import Tensor, nn
from torch.nn import functional

from pretrain.encoders.base import Encoder, Features, Mask, on_token_grid, zero_hidden_pixels
from pretrain.encoders.timm import drawn_paths
from pretrain.encoders.timm.config import TimmConfig
from pretrain.encoders.timm.dropping import left_out
from pretrain.encoders.timm.embeddings import calls_of, map_of, replaced
from pretrain.encoders.timm.survey import check_name, create, survey

#: First parts of the names of what follows the last block.
AFTER_BLOCKS = ("norm", "fc_norm", "head", "final_conv", "conv_head")


class TimmEncoder(Encoder):
    """A timm model without its classifier (`self.model`). Its pooled feature is what timm gives to the classifier.

    Where timm's map of features has another width than its pooled feature, or there is no single map, the pooled
    feature is the only token; CrossViT's branches are one map. Hidden units' pixels are zeroed, and their embedded
    tokens substituted, in models that embed the image once or once a branch, or left out, where the blocks take any
    subset of the patches (`dropping.py`). Batch normalisation, in models that have it, sees a micro-batch.

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
        drawn_paths.take_over(self.model, self.blocks())
        self.mask_token = None
        if mask_token:
            if self.survey.unmaskable:
                raise ValueError(f"timm:{config.model} can't be trained by replacing tokens: {self.survey.unmaskable}")
            self.mask_token = nn.Parameter(torch.zeros(sum(own.width for own in self.survey.embeddings)))
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask: Mask | None = None, layers: tuple[int, ...] = ()) -> Features:
        size = (images.shape[2], images.shape[3])
        hidden = units = None
        count = (size[0] // self.patch) * (size[1] // self.patch)
        if mask is not None:
            images = zero_hidden_pixels(images, mask.drop, mask.token)
            hidden = mask.token
            if mask.drop is not None:
                if self.survey.undroppable:
                    raise ValueError(f"a timm model of this kind {self.survey.undroppable}: units can't be dropped")
                dropped, _ = on_token_grid(mask, (size[0] // self.patch, size[1] // self.patch))
                units = dropped.visible_ids()
        assert hidden is None or self.mask_token is not None, "built without mask_token, so no unit can be replaced"
        blocks = self.blocks()
        if layers and not blocks:
            raise ValueError(
                "this timm model has no blocks that all give what the last one gives, so no earlier layers"
            )
        wanted = {index: blocks[index] for index in layers}
        if self.survey.drop_calls:
            drawn_paths.draw(self.model, self.survey.drop_calls, images)
        with (
            replaced(self.model, self.survey.embeddings, hidden, self.mask_token, size),
            left_out(self.model, units, count),
            calls_of(wanted) as calls,
        ):
            features = self._features(self.model.forward_features(images), size, units)
        earlier = tuple(self._features(self.final_norm(calls[index][0][1]), size, units) for index in layers)
        return features._replace(layers=earlier)

    def _features(self, given: Any, size: tuple[int, int], units: Tensor | None) -> Features:
        pooled = self.model.forward_head(given, pre_logits=True)
        if self.survey.layout == "none":
            return Features(rearrange(pooled, "b d -> b 1 d"), None, None, None, pooled)
        if self.survey.layout == "branches":
            return self._of_branches(given, pooled)
        if self.survey.layout == "sequence":
            count = self.survey.num_prefix
            prefix, tokens = given[:, :count] if count else None, given[:, count:]
            if units is not None:
                return Features(tokens, prefix, None, rearrange(units, "b n -> b n 1"), pooled)
            return Features(tokens, prefix, map_of(tokens.shape[1], size), None, pooled)
        cells = given if self.survey.layout == "rows columns channels" else rearrange(given, "b d h w -> b h w d")
        return Features(rearrange(cells, "b h w d -> b (h w) d"), None, tuple(cells.shape[1:3]), None, pooled)

    def _of_branches(self, given: Sequence[Tensor], pooled: Tensor) -> Features:
        """The tokens of all branches beside each other, on the map of the first, to which the others are resized."""
        grid = self.survey.embeddings[0].grid
        maps = []
        for part, own in zip(given, self.survey.embeddings, strict=True):
            cells = rearrange(part[:, 1:], "b (h w) d -> b d h w", h=own.grid[0])
            if own.grid != grid:
                cells = functional.interpolate(cells, size=grid, mode="bilinear", align_corners=False)
            maps.append(rearrange(cells, "b d h w -> b (h w) d"))
        prefix = torch.cat([part[:, :1] for part in given], dim=-1)
        return Features(torch.cat(maps, dim=-1), prefix, grid, None, pooled)

    def merged(self) -> TimmEncoder:
        """With RepVGG's branches, and whatever else timm knows to fuse, as one convolution each (Ding et al. 2021)."""
        copied = deepcopy(self)
        copied.model = reparameterize_model(copied.model, inplace=True)
        return copied

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
