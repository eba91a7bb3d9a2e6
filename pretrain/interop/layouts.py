"""The layouts of official checkpoints: from their tensors to our names.

A layout is a function from the checkpoint's tensors to `Imported`. What it does not take it says why.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from pydantic import ValidationError
from torch import Tensor

from pretrain.config import BeitConfig, EncoderConfig, PvtConfig, SwinConfig, UmMaeSwinConfig, VitConfig
from pretrain.config.encoders import VIT_SIZES
from pretrain.config.load import override_section
from pretrain.encoders.patches import sincos_positions

State = dict[str, Tensor]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
#: Buffers that the modules compute themselves.
COMPUTED = ("relative_position_index", "attn_mask", "relative_coords_table")
#: Tokens along a window or map with relative positions: their pairs, computed from it, take its fourth power in memory.
LARGEST_WINDOW = 128


@dataclass
class Imported:
    """What a checkpoint holds, under our names.

    encoder: the encoder it is for, and `image_size` the images (h, w px) its positions were made for.
    weights: of the encoder's inner module. mask_token: of replaced units, where there is one.
    method: what belongs to the method around the encoder (decoder, head), by the method's own names.
    left: keys that were not taken, each with the reason. resized: those that were interpolated, with both shapes.
    normalisation: mean and std of its pixels in 0 .. 1.
    """

    encoder: EncoderConfig
    image_size: tuple[int, int]
    weights: State
    method_name: str
    mask_token: Tensor | None = None
    method: State = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET


class CheckpointState:
    """A checkpoint's tensors, taken key by key."""

    def __init__(self, checkpoint: Any, which: str, overrides: tuple[str, ...], image_size: int | None = None) -> None:
        self.which, self.overrides, self.image_size = which, overrides, image_size
        if not isinstance(checkpoint, Mapping):
            raise ValueError(f"the checkpoint is a {type(checkpoint).__name__}; a dictionary of tensors is needed")
        self.left: dict[str, str] = {}
        self.tensors: State = self._unwrapped(checkpoint)

    def _unwrapped(self, checkpoint: Mapping[str, Any]) -> State:
        for name in ("model", "state_dict", self.which, "model_ema", "module"):
            inner = checkpoint.get(name)
            if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
                for key in checkpoint:
                    if key != name:
                        self.left[f"[{key}]"] = "beside the weights"
                return self._unwrapped(inner)
        tensors = {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}
        for key in checkpoint:
            if key not in tensors:
                self.left[f"[{key}]"] = "no tensor"
        if not tensors:
            raise ValueError(
                f"the checkpoint holds no tensors; its keys are {', '.join(map(str, list(checkpoint)[:8]))}"
            )
        for key, value in tensors.items():
            if not isinstance(key, str):
                raise ValueError(f"the checkpoint's key {key!r} is a {type(key).__name__}; tensors have names")
            # a view may claim more numbers than it has, which a copy would then take in memory
            whole = value.layout == torch.strided and value.device.type == "cpu"
            if not whole or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError(f"the checkpoint's {key} is not a dense tensor with all of its numbers")
        return tensors

    def drop_prefix(self, prefix: str) -> None:
        """Take a prefix off every key that has it."""
        self.tensors = {key.removeprefix(prefix): value for key, value in self.tensors.items()}

    def keep(self, prefix: str, why_not: str) -> None:
        """Keep only the keys with `prefix`, and take it off; ValueError where there are none."""
        if not any(key.startswith(prefix) for key in self.tensors):
            near = ", ".join(list(self.tensors)[:6])
            raise ValueError(f"no key begins with {prefix} as in this layout, but with {near}: is it another (--as)?")
        for key in self.tensors:
            if not key.startswith(prefix):
                self.left[key] = why_not
        self.tensors = {
            key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)
        }

    def leave(self, pattern: str, why: str) -> None:
        """Leave out the keys that match."""
        for key in [key for key in self.tensors if re.search(pattern, key)]:
            self.left[key] = why
            del self.tensors[key]

    def take(self, *prefixes: str) -> State:
        """Remove and return the keys that begin so."""
        return {key: self.tensors.pop(key) for key in list(self.tensors) if key.startswith(prefixes)}

    def rename(self, pattern: str, replacement: str | Callable[[re.Match[str]], str]) -> None:
        """Rename keys by a regular expression."""
        self.tensors = {re.sub(pattern, replacement, key): value for key, value in self.tensors.items()}

    def config(self, inferred: EncoderConfig) -> EncoderConfig:
        """What the weights tell of the encoder, with the user's overrides."""
        try:
            return override_section(inferred, self.overrides)
        except ValidationError as error:
            raise ValueError(f"{inferred.family}: {told(error)}") from None

    def get(self, key: str) -> Tensor:
        """A tensor that must be there."""
        if key not in self.tensors:
            near = ", ".join(list(self.tensors)[:6])
            raise ValueError(f"the checkpoint has no {key}; it begins with {near}: is it another layout (--as)?")
        return self.tensors[key]


def _count(state: State, pattern: str, first: int = 0) -> int:
    """How many numbers, from `first` on, `pattern` finds in the keys."""
    found = {int(match[1]) for key in state if (match := re.match(pattern, key))}
    if not found:
        raise ValueError(f"the checkpoint has no keys like {pattern}; it begins with {', '.join(list(state)[:6])}")
    if found != set(range(first, first + len(found))):
        raise ValueError(f"the checkpoint's keys like {pattern} are numbered with gaps, up to {max(found)}")
    return len(found)


def channels_of(weights: State) -> int:
    for key in ("patch_embed.proj.weight", "patch_embed1.proj.weight"):
        if key in weights:
            return weights[key].shape[1]
    raise ValueError("the checkpoint has no patch embedding")


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _square(count: int, what: str) -> int:
    side = math.isqrt(max(count, 0))
    if side * side != count or not side:
        raise ValueError(f"{what} has {count} entries, which is no square; only square images can be imported")
    return side


def _window(table: Tensor, extra: int = 0) -> int:
    """Side of the window that a table of relative positions ((2 w - 1)^2 + extra, heads) is for."""
    window = (_square(len(table) - extra, "relative_position_bias_table") + 1) // 2
    if window > LARGEST_WINDOW:
        raise ValueError(f"relative_position_bias_table is for windows of {window} tokens; at most {LARGEST_WINDOW}")
    return window


def patch_grid(config: EncoderConfig, size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // config.patch, size[1] // config.patch


def _heads(dim: int) -> int:
    """Qkv weights do not tell the number of heads: that of the published size, or a head is 64 wide (ViT and PVT)."""
    published = {width: heads for width, _, heads in VIT_SIZES.values()}
    return published.get(dim) or max(1, dim // 64)


def _vit(state: CheckpointState, method: str, *, sincos: bool = False) -> Imported:
    """timm's and DeiT's names, which MAE and DINO share."""
    tensors = state.tensors
    state.leave("relative_position_index", "computed")
    if "fc_norm.weight" in tensors and "norm.weight" not in tensors:
        raise ValueError("a fine-tuned classifier (fc_norm without norm); import the pretraining checkpoint")
    state.leave(r"^(head|head_dist|fc_norm|pre_logits)\.", "a classifier's")
    projection = state.get("patch_embed.proj.weight")
    dim, patch = projection.shape[0], projection.shape[-1]
    positions = state.get("pos_embed")
    if "register_tokens" in state.tensors:  # DINOv2's name; timm's has a position each, DINOv2's have none
        registers = state.tensors.pop("register_tokens")
        state.tensors["reg_token"] = registers
        zeros = torch.zeros_like(registers)
        state.tensors["pos_embed"] = torch.cat([positions[:, :1], zeros, positions[:, 1:]], dim=1)
    num_registers = state.tensors["reg_token"].shape[1] if "reg_token" in state.tensors else 0
    distilled = "dist_token" in state.tensors
    num_prefix = ("cls_token" in state.tensors) + distilled + num_registers
    num_rows = state.tensors["pos_embed"].shape[1]
    if not _is_square(num_rows - num_prefix) and _is_square(num_rows):  # DeiT III, timm's DINOv2 with registers
        zeros = positions.new_zeros(1, num_prefix, dim)
        state.tensors["pos_embed"] = torch.cat([zeros, state.tensors["pos_embed"]], dim=1)
        num_rows += num_prefix
    side = _square(num_rows - num_prefix, "pos_embed")
    if any(".mlp.w12" in key for key in state.tensors):
        raise ValueError("its MLPs are SwiGLU (DINOv2 giant), which our ViT does not have")
    config = VitConfig(
        dim=dim,
        depth=_count(state.tensors, r"blocks\.(\d+)\."),
        heads=_heads(dim),
        patch=patch,
        positions="sincos" if sincos else "learned",
        class_token="cls_token" in state.tensors,
        distillation_token=distilled,
        registers=num_registers,
        pool="class" if "cls_token" in state.tensors and method != "mae" else "mean",
        layer_scale=1e-5 if any(key.endswith("ls1.gamma") for key in state.tensors) else None,
    )
    return Imported(
        state.config(config), (side * patch, side * patch), dict(state.tensors), method, left=state.left
    )  # fmt: skip


def read_mae(state: CheckpointState) -> Imported:
    """{"model": timm's ViT names, decoder_*, mask_token of the decoder} (He et al. 2022)."""
    state.drop_prefix("module.")
    state.leave("^decoder_pos_embed$", "fixed sin-cos positions, computed")
    decoder = state.take("decoder_", "mask_token")
    imported = _vit(state, "mae", sincos=True)
    grid = patch_grid(imported.encoder, imported.image_size)
    fixed = sincos_positions(imported.encoder.shape[0], grid)
    if not torch.allclose(imported.weights["pos_embed"][:, -len(fixed) :], fixed[None], atol=1e-4):
        imported.encoder = dataclasses.replace(imported.encoder, positions="learned")
    imported.method = decoder
    return imported


def read_dino(state: CheckpointState) -> Imported:
    """{"student", "teacher"} with `module.` and `backbone.` prefixes and head.*, or a backbone alone."""
    state.drop_prefix("module.")
    head = {}
    if any(key.startswith("backbone.") for key in state.tensors):
        head = state.take("head.")
        state.drop_prefix("backbone.")
    imported = _vit(state, "dino")
    imported.method = head
    return imported


def read_dinov2(state: CheckpointState) -> Imported:
    """A released backbone, or {"teacher": backbone.*, dino_head.*, ibot_head.*}; blocks may be chunked."""
    for prefix in (f"{state.which}.backbone.", "backbone."):
        if any(key.startswith(prefix) for key in state.tensors):
            state.leave(r"(dino|ibot)_head\.|dino_loss|ibot_patch_loss", "a head of DINOv2's own layout")
            state.keep(prefix, f"not of the {state.which}'s backbone")
            break
    state.rename(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.")  # blocks.CHUNK.N of training checkpoints
    mask_token = state.tensors.pop("mask_token", None)
    imported = _vit(state, "dino")
    if mask_token is not None:
        imported.mask_token = rearrange(mask_token, "... d -> 1 1 (... d)")
    return imported


def read_beit(state: CheckpointState) -> Imported:
    """BEiT and BEiT v2: q_bias and v_bias, tables of relative positions, shared or one a block (fine-tuned)."""
    state.drop_prefix("module.")
    state.leave("|".join(COMPUTED), "computed")
    head = {f"head.{key.partition('.')[2]}": value for key, value in state.take("lm_head.").items()}
    further = state.take("cls_pt_layers.")  # of version 2, whose pixels are normalised as ImageNet's
    head |= {f"aggregation.blocks.{key.partition('.')[2]}": value for key, value in further.items()}
    state.leave("^cls_pt_lm_head", "a second vocabulary layer; ours shares one")
    imported = _beit(state)
    imported.method |= head
    imported.normalisation = IMAGENET if further else INCEPTION
    return imported


def _beit(state: CheckpointState) -> Imported:
    state.leave("|".join(COMPUTED), "computed")
    state.leave(r"^head\.", "a classifier's")
    mask_token = state.tensors.pop("mask_token", None)
    projection = state.get("patch_embed.proj.weight")
    dim, patch = projection.shape[0], projection.shape[-1]
    shared = "rel_pos_bias.relative_position_bias_table" in state.tensors
    prefix = "rel_pos_bias" if shared else "blocks.0.attn"
    table = state.get(f"{prefix}.relative_position_bias_table")
    side = _window(table, extra=3)
    config = BeitConfig(
        dim=dim,
        depth=_count(state.tensors, r"blocks\.(\d+)\."),
        heads=table.shape[1],
        patch=patch,
        relative_positions="shared" if shared else "per_block",
        absolute_positions="pos_embed" in state.tensors,
        layer_scale=0.1 if "blocks.0.gamma_1" in state.tensors else None,
        pooled_norm="fc_norm.weight" in state.tensors and "norm.weight" not in state.tensors,
    )
    return Imported(
        state.config(config), (side * patch, side * patch), dict(state.tensors), "mim",
        mask_token=mask_token, left=state.left,
    )  # fmt: skip


def read_simmim(state: CheckpointState) -> Imported:
    """`encoder.` prefix, on Swin (downsampling at the end of a stage) or BEiT-like ViT; `decoder.0` is the head."""
    state.drop_prefix("module.")
    head = {
        f"head.{key.rpartition('.')[2]}": (rearrange(value, "o i 1 1 -> o i") if value.ndim == 4 else value)
        for key, value in state.take("decoder.0.").items()
    }
    state.keep("encoder.", "outside of the encoder")
    imported = _swin(state) if any(key.startswith("layers.") for key in state.tensors) else _beit(state)
    imported.method |= head
    return imported


def _swin(state: CheckpointState, method: str = "mim") -> Imported:
    """The official names, where a stage ends with its downsampling, or timm's, where it begins with it."""
    state.leave(r"relative_position_index|attn_mask", "computed")
    state.leave(r"^head\.", "a classifier's")
    tables = state.tensors.copy()
    state.leave("relative_coords_table", "computed")
    if "layers.0.downsample.norm.weight" in state.tensors:
        state.rename(r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample")
    if "absolute_pos_embed" in state.tensors:
        raise ValueError("it has absolute positions (absolute_pos_embed), which our Swin does not have")
    mask_token = state.tensors.pop("mask_token", None)
    if mask_token is not None:
        mask_token = rearrange(mask_token, "1 1 d -> 1 1 1 d")
    projection = state.get("patch_embed.proj.weight")
    num_stages = _count(state.tensors, r"layers\.(\d+)\.")
    depths = tuple(_count(state.tensors, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(num_stages))
    version = 2 if "layers.0.blocks.0.attn.logit_scale" in state.tensors else 1
    key = "logit_scale" if version == 2 else "relative_position_bias_table"
    heads = tuple(
        state.get(f"layers.{stage}.blocks.0.attn.{key}").shape[0 if version == 2 else 1] for stage in range(num_stages)
    )
    first, last = (f"layers.{stage}.blocks.0.attn" for stage in (0, num_stages - 1))
    if version == 1:
        window, last_window = (_window(state.get(f"{block}.relative_position_bias_table")) for block in (first, last))
    else:
        window, last_window = (_coordinates_window(state, tables, block) for block in (first, last))
    patch = projection.shape[-1]
    config = SwinConfig(
        version=version, dim=projection.shape[0], depths=depths, heads=heads, patch=patch, window=window
    )
    side = last_window * patch * 2 ** (num_stages - 1)  # as published: the last stage is one window
    return Imported(
        state.config(config), (side, side), dict(state.tensors), method, mask_token=mask_token, left=state.left
    )


def _coordinates_window(state: CheckpointState, tables: State, block: str) -> int:
    """Side of the windows of a block of version 2, from the table of coordinates that official files hold."""
    table = tables.get(f"{block}.relative_coords_table")
    if table is None:  # timm's files: the window is the user's to tell, and the last stage's follows from the image
        if state.image_size is None or not any(override.startswith("window=") for override in state.overrides):
            raise ValueError(
                "the weights of this Swin v2 tell neither its window nor its image size; give those that its name "
                "says, such as window=8 --image-size 256 (names such as window12to16 are of models that ours is not)"
            )
        return 8
    # from -1 to 1 where the windows are those it was pretrained with: then x is sign(8 x) log2(|8 x| + 1) / 3
    if table.shape[1] > 1 and abs(float(table.max()) - math.log2(9) / 3) > 1e-3:
        raise ValueError(
            "its coordinates are scaled to the window of an earlier pretraining (as in 12to16), which our Swin does "
            "not do; import the checkpoint of that pretraining"
        )
    return (table.shape[1] + 1) // 2


def read_um_mae(state: CheckpointState) -> Imported:
    """UM-MAE's own names: flat blocks with downsampling inside; its decoder's pixel shuffle ordered as ours."""
    state.drop_prefix("module.")
    state.leave("^decoder_pos_embed$", "fixed sin-cos positions, computed")
    mask_token = state.tensors.pop("vis_mask_token", None)
    if mask_token is not None:
        mask_token = rearrange(mask_token, "1 1 d -> 1 1 1 d")
    decoder = state.take("decoder_", "mask_token")
    for name in ("decoder_embed.weight", "decoder_embed.bias"):
        if name in decoder:  # torch's PixelShuffle has the channel first, ours the position
            decoder[name] = rearrange(decoder[name], "(c k) ... -> (k c) ...", k=4)
    state.leave(r"^head\.", "a classifier's")
    projection = state.get("patch_embed.proj.weight")
    dims, depths = [projection.shape[0]], [0]
    ratios: list[float] = []
    for block in range(_count(state.tensors, r"blocks\.(\d+)\.")):
        dim = state.get(f"blocks.{block}.norm1.weight").shape[0]
        if f"blocks.{block}.downsample.proj.weight" in state.tensors:
            dims.append(dim)
            depths.append(0)
        depths[-1] += 1
        if depths[-1] == 1:
            ratios.append(state.get(f"blocks.{block}.mlp.fc1.weight").shape[0] / dim)
    patch = projection.shape[-1]
    config: EncoderConfig
    if "blocks.0.attn.posmlp.0.weight" in state.tensors:
        starts = [sum(depths[:stage]) for stage in range(len(depths))]
        config = UmMaeSwinConfig(
            dim=dims[0],
            depths=tuple(depths),
            heads=tuple(state.get(f"blocks.{start}.attn.posmlp.2.weight").shape[0] for start in starts),
            patch=patch,
            position_dim=state.get("blocks.0.attn.posmlp.0.weight").shape[0],
        )
        side = 8 * config.stride  # as published: 256 px
    else:
        config = PvtConfig(
            reduction="pool",
            dims=tuple(dims),
            depths=tuple(depths),
            heads=tuple(_heads(dim) for dim in dims),
            mlp_ratios=tuple(ratios),
            patch=patch,
        )
        side = _square(state.get("pos_embed").shape[1], "pos_embed") * patch
    return Imported(
        state.config(config), (side, side), dict(state.tensors), "mae",
        mask_token=mask_token, method=decoder, left=state.left,
    )  # fmt: skip


def read_pvt(state: CheckpointState) -> Imported:
    """The official PVT v1 classifiers: patch_embedN, pos_embedN, blockN."""
    state.drop_prefix("module.")
    state.leave(r"^head\.", "a classifier's")
    num_stages = _count(state.tensors, r"patch_embed(\d+)\.", first=1)
    stages = range(1, num_stages + 1)
    dims = tuple(state.get(f"patch_embed{stage}.proj.weight").shape[0] for stage in stages)
    sr = tuple(
        state.tensors[key].shape[-1] if (key := f"block{stage}.0.attn.sr.weight") in state.tensors else 1
        for stage in stages
    )
    ratios = tuple(
        state.get(f"block{stage}.0.mlp.fc1.weight").shape[0] / dim for stage, dim in zip(stages, dims, strict=True)
    )
    patch = state.get("patch_embed1.proj.weight").shape[-1]
    config = PvtConfig(
        dims=dims,
        depths=tuple(_count(state.tensors, rf"block{stage}\.(\d+)\.") for stage in stages),
        heads=tuple(_heads(dim) for dim in dims),
        mlp_ratios=ratios,
        sr=sr,
        patch=patch,
    )
    side = _square(state.get("pos_embed1").shape[1], "pos_embed1") * patch
    return Imported(state.config(config), (side, side), dict(state.tensors), "timm", left=state.left)


def read_timm(state: CheckpointState) -> Imported:
    """A timm ViT, DeiT, BEiT or Swin, told apart by its names."""
    if any(key.startswith("layers.") for key in state.tensors):
        return _swin(state, "timm")
    if any(key.endswith("attn.q_bias") for key in state.tensors):
        imported = _beit(state)
        imported.method_name, imported.normalisation = "timm", INCEPTION
        return imported
    return _vit(state, "timm")


LAYOUTS: dict[str, Callable[[CheckpointState], Imported]] = {
    "mae": read_mae,
    "dino": read_dino,
    "beit": read_beit,
    "simmim": read_simmim,
    "um_mae": read_um_mae,
    "dinov2": read_dinov2,
    "pvt": read_pvt,
    "timm": read_timm,
}


def told(error: ValidationError) -> str:
    return error.errors()[0]["msg"].removeprefix("Value error, ")
