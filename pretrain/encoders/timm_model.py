"""Any timm model as a frozen encoder, to be probed beside our own (`timm:NAME`)."""

from __future__ import annotations

import difflib

import timm
import torch
from einops import rearrange
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from pretrain.encoders.base import Encoder, Features, Mask


class TimmEncoder(Encoder):
    """A timm model without its classifier. Its pooled feature is what timm gives to the classifier.

    Raises ValueError for a name timm does not know, naming the nearest ones.
    """

    drop_layout = "any"

    def __init__(self, name: str, pretrained: bool, image_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
            raise ValueError(f"timm {timm.__version__} has no model {name!r}; the nearest names: {', '.join(near)}")
        size = {} if image_size is None else {"img_size": image_size}
        try:
            self.model = timm.create_model(name, pretrained=pretrained, num_classes=0, **size)
        except TypeError:  # convolutional models take any size and have no such argument
            self.model = timm.create_model(name, pretrained=pretrained, num_classes=0)
        data = resolve_model_data_config(self.model)
        self.mean, self.std = tuple(data["mean"]), tuple(data["std"])
        self.image_size = image_size or tuple(data["input_size"][1:])
        self.channels = data["input_size"][0]
        self.num_prefix = getattr(self.model, "num_prefix_tokens", 0)
        self.has_class_token = self.num_prefix > 0
        self.dim = self.model.num_features

    def forward(self, images: Tensor, mask: Mask | None = None, layers: tuple[int, ...] = ()) -> Features:
        if mask is not None or layers:
            raise ValueError("a timm:NAME encoder is probed as it is: it takes no mask and gives no earlier layers")
        features = self.model.forward_features(images)
        pooled = self.model.forward_head(features, pre_logits=True)
        prefix = None
        if features.ndim == 4:
            channels_last = features.shape[-1] == self.dim
            pattern = "b h w d -> b (h w) d" if channels_last else "b d h w -> b (h w) d"
            tokens = rearrange(features, pattern)
        elif features.ndim == 3:
            prefix = features[:, : self.num_prefix] if self.num_prefix else None
            tokens = features[:, self.num_prefix :]
        else:
            tokens = rearrange(pooled, "b d -> b 1 d")
        return Features(tokens, prefix, None, None, pooled)

    def blocks(self) -> list[nn.Module]:
        return []

    @torch.no_grad()
    def attention(self, images: Tensor) -> Tensor | None:
        return None
