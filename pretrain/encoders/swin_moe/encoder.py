"""Swin-MoE (Hwang et al. 2023, "Tutel"; microsoft/Swin-Transformer): Swin with experts in some of its blocks."""

from __future__ import annotations

import torch
from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from data_pipelines.rng import Purpose
from pretrain.encoders import drop_path, side_losses
from pretrain.encoders.base import drop_path_rates
from pretrain.encoders.compact import Compact
from pretrain.encoders.pyramid import Pyramid
from pretrain.encoders.swin_moe.blocks import Block, MoeBlock
from pretrain.encoders.swin_moe.config import SwinMoeConfig
from pretrain.encoders.swin_moe.experts import Routed
from pretrain.stream.from_host import from_host


class SwinMoeEncoder(Pyramid):
    """Swin-MoE behind the Encoder seam; `self.swin` has the names of the authors' weights but for those of the experts.

    In training it adds the balance loss of its layers of experts to the method's, and tells how they are used.
    """

    def __init__(
        self, config: SwinMoeConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        dim, depths, _ = config.shape
        self.config = config
        self.patch, self.stride = config.patch, config.stride
        self.depths, self.depth, self.dim = depths, sum(depths), dim * 2 ** (len(depths) - 1)
        self.swin = SwinMoe(config, image_size, channels)
        self.make_mask_token(dim, mask_token)

    def embed(self, images: Tensor) -> Tensor:
        return self.swin.patch_embed(images)

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        kept: dict[int, Tensor] = {}
        count, device = tokens.shape[0], tokens.device
        paths = drop_path.paths_of(self.blocks(), count, device)
        group, keys = self._group(count), self._noise_keys(count, device)
        routed: dict[int, Routed] = {}
        index = 0
        for stage in self.swin.layers:
            for block in stage.blocks:
                if isinstance(block, MoeBlock):
                    routed[index] = block(tokens, paths[index], group, keys)
                    tokens = routed[index].tokens
                else:
                    tokens = block(tokens, paths[index])
                if index in wanted:
                    kept[index] = tokens
                index += 1
            tokens = stage.downsample(tokens)
        if self.training and routed:
            self._tell(routed)
        return tokens, kept

    def _group(self, images: int) -> int:
        """How many images are routed together, of so many that are all crops of one view, then of the next.

        ValueError for a micro-batch that does not consist of whole groups of rows of the global batch.
        """
        group, draws = self.config.group, drop_path.current_draws()
        if not self.training:
            return 1
        if draws is None:
            return group if images % group == 0 else images
        rows = draws.rows
        if len(rows) % group or len({*(rows[::group] % group).tolist(), 0}) > 1:
            raise ValueError(
                f"encoder.group is {group}: experts count their places over so many rows, and the micro-batch has "
                f"{len(rows)}, from row {int(rows[0])} of the batch on; set encoder.group to a divisor of it"
            )
        return group

    def _noise_keys(self, images: int, device: torch.device) -> Tensor | None:
        """(images,) int64, of the noise on what the routers say."""
        draws = drop_path.current_draws()
        if draws is None or not self.training or not self.config.gate_noise:
            return None
        return from_host(draws.keys(Purpose.GATE_NOISE, drop_path.ENCODER, images).view("int64"), device)

    def _tell(self, routed: dict[int, Routed]) -> None:
        side_losses.add("moe_balance", sum(each.balance for each in routed.values()), self.config.balance_weight)
        loads = torch.stack([each.load for each in routed.values()])
        side_losses.tell("moe_dropped", torch.stack([each.dropped for each in routed.values()]).mean())
        side_losses.tell("moe_load_highest", loads.amax())
        side_losses.tell("moe_load_lowest", loads.amin())
        if self.config.log_loads:
            for index, each in routed.items():
                side_losses.tell(f"moe_dropped/block_{index}", each.dropped)
                for expert, load in enumerate(each.load.unbind()):
                    side_losses.tell(f"moe_load/block_{index}_expert_{expert}", load)

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
        before = sum(self.depths[:stage])
        return before + (int(parts[parts.index("blocks") + 1]) + 1 if "blocks" in parts else self.depths[stage])

    def no_decay(self, parameter_name: str) -> bool:
        parts = parameter_name.split(".")
        return any(part in ("cpb_mlp", "temperature", "cosine_projector", "sim_matrix") for part in parts)


class SwinMoe(nn.Module):
    """The modules of Swin-MoE, where the authors have them; the encoder runs them."""

    def __init__(self, config: SwinMoeConfig, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        dim, depths, _ = config.shape
        self.patch_embed = PatchEmbed(
            image_size, config.patch, channels, dim, norm_layer=nn.LayerNorm, output_fmt="NHWC", strict_img_size=False
        )
        self.layers = nn.ModuleList(Stage(config, number, image_size) for number in range(len(depths)))
        self.norm = nn.LayerNorm(dim * 2 ** (len(depths) - 1))
        self.apply(_initialise)


class Stage(nn.Module):
    """The blocks of a stage, and what halves the map after them."""

    def __init__(self, config: SwinMoeConfig, number: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        dim, depths, heads = config.shape
        first, width = sum(depths[:number]), dim * 2**number
        window = config.window_of(number, image_size)
        rates = drop_path_rates(config.drop_path, sum(depths), first, depths[number])
        experts = config.expert_blocks_of(number)
        self.blocks = nn.ModuleList()
        for index in range(depths[number]):
            common = (width, heads[number], window, index % 2 == 1, rates[index], config)
            self.blocks.append(MoeBlock(*common, first + index) if index in experts else Block(*common))
        last = number == len(depths) - 1
        self.downsample = nn.Identity() if last else PatchMerging(width)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
