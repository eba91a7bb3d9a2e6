"""The Swin transformer over timm, version 1 (Liu et al. 2021) and 2 (Liu et al. 2022)."""

from __future__ import annotations

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.compact import Compact
from pretrain.encoders.pyramid import Pyramid
from pretrain.encoders.swin.config import SwinConfig
from pretrain.encoders.swin.windows import teach


class SwinEncoder(Pyramid):
    """A timm SwinTransformer or SwinTransformerV2 (`self.swin`, whose weights load in timm as they are)."""

    def __init__(
        self, config: SwinConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        dim, depths, heads = config.shape
        self.patch, self.stride = config.patch, config.stride
        self.depths, self.depth = depths, sum(depths)
        self.swin = (SwinTransformer if config.version == 1 else SwinTransformerV2)(
            img_size=image_size,
            patch_size=config.patch,
            in_chans=channels,
            num_classes=0,
            embed_dim=dim,
            depths=depths,
            num_heads=heads,
            window_size=config.window,
            drop_path_rate=config.drop_path,
            strict_img_size=False,
        )
        for stage in self.swin.layers:
            for block in stage.blocks:
                teach(block)
        self.dim = self.swin.num_features
        self.make_mask_token(dim, mask_token)

    def embed(self, images: Tensor) -> Tensor:
        return self.swin.patch_embed(images)

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        kept: dict[int, Tensor] = {}
        paths = drop_path.paths_of(self.blocks(), tokens.shape[0], tokens.device)
        index = 0
        for stage in self.swin.layers:
            tokens = stage.downsample(tokens)
            for block in stage.blocks:
                tokens = block(tokens, paths[index])
                if index in wanted:
                    kept[index] = tokens
                index += 1
        return tokens, kept

    def final_norm(self, states: Tensor) -> Tensor:
        return self.swin.norm(states)

    def inner(self) -> nn.Module:
        return self.swin

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.swin.layers for block in stage.blocks]

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        if "layers" not in parts:
            return self.depth + 1 if "norm" in parts and "patch_embed" not in parts else 0
        stage = int(parts[parts.index("layers") + 1])
        before = sum(len(earlier.blocks) for earlier in self.swin.layers[:stage])
        return before + (int(parts[parts.index("blocks") + 1]) + 1 if "blocks" in parts else 1)

    def no_decay(self, parameter_name: str) -> bool:
        return "cpb_mlp" in parameter_name or "logit_scale" in parameter_name  # of version 2
