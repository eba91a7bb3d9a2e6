"""`selfsight import`: official checkpoints under our names, every key accounted for.

A layout is a function from the checkpoint's tensors to `Imported`. What it does not take it says why; a key it does not
know, or one that the encoder needs and the file has not, is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipelines.files import staged, write_json
from pretrain.config import override_section
from pretrain.encoders import build_encoder
from pretrain.encoders.saved import EncoderCard, save_encoder
from pretrain.encoders.transfer import fit
from pretrain.patches import sincos_positions
from pretrain.schema import BeitConfig, EncoderConfig, PvtConfig, SwinConfig, UmMaeSwinConfig, VitConfig
from pretrain.schema.encoders import VIT_SIZES

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


def import_checkpoint(
    file: Path,
    layout: str,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    which: str = "teacher",
) -> Imported:
    """Read `file` in a `layout` of LAYOUTS and write an encoder folder `out`, which probes, exports and starts runs.

    Args:
        file: A .pth, .pt or .bin of tensors, or .safetensors.
        overrides: `key=value` of the encoder's configuration that the weights do not tell, such as heads=6.
        image_size: Side in px to fit positions to; default: what they were made for.
        mean, std: Of the pixels it was trained on; default: the layout's.
        which: teacher or student, where the checkpoint holds both.

    Writes `model.safetensors` and `config.json`, `method.safetensors` with the decoder or heads, and `import.json` with
    what became of every key. Raises ValueError for a key it can't account for, FileExistsError where `out` exists.
    `out` is there whole or not at all.
    """
    if which not in ("teacher", "student"):
        raise ValueError(f"which is {which!r}; a checkpoint holds a teacher and a student")
    if layout not in LAYOUTS:
        raise ValueError(f"there is no layout {layout!r}; --as takes one of {', '.join(LAYOUTS)}")
    if out.exists():
        raise FileExistsError(f"{out} exists; name a new folder, or remove it")
    checkpoint = read_tensors(file)
    try:
        imported = LAYOUTS[layout](_State(checkpoint, which, tuple(overrides), image_size))
    except ValidationError as error:  # what its weights tell is no such encoder
        raise ValueError(f"{file} is not in layout {layout} (--as): {_told(error)}") from None
    for key, value in {**imported.weights, **imported.method}.items():
        if not value.is_floating_point():
            raise ValueError(
                f"{key} holds {value.dtype}, which is no floating-point number: quantised weights, perhaps"
            )
    size = imported.image_size if image_size is None else (image_size, image_size)
    stride = imported.encoder.stride
    if size[0] % stride:
        below = max(size[0] // stride, 1) * stride
        raise ValueError(
            f"--image-size is {size[0]}; the encoder's stride is {stride} px, so it must be a multiple of that, such "
            f"as {below} or {below + stride}"
        )
    channels = _channels(imported.weights)
    imported.normalisation = _normalisation(imported, channels, mean, std)
    encoder = build_encoder(imported.encoder, size, channels, mask_token=imported.mask_token is not None)
    names = encoder.inner().state_dict()
    missing = sorted(set(names) - set(imported.weights))
    unknown = sorted(set(imported.weights) - set(names))
    if missing or unknown:
        raise ValueError(
            f"{file} is not the checkpoint of a {imported.encoder.family} in layout {layout}: "
            + "; ".join(
                f"{what} {', '.join(keys[:6])}{f' and {len(keys) - 6} more' if len(keys) > 6 else ''}"
                for what, keys in (("it lacks", missing), ("it has the unknown", unknown))
                if keys
            )
        )
    grids = tuple(_grid(imported.encoder, s) for s in (imported.image_size, size))
    fitted = fit(imported.weights, encoder, old_grid=grids[0])
    if fitted.left or fitted.fresh:
        problems = [f"{key}: {why}" for key, why in {**fitted.left, **fitted.fresh}.items()]
        raise ValueError(f"{file} does not fit {imported.encoder}: {'; '.join(problems[:5])}")
    encoder.inner().load_state_dict(fitted.weights)
    if imported.mask_token is not None:
        imported.method["encoder.mask_token"] = imported.mask_token
    imported.resized = fitted.resized
    card = EncoderCard(
        encoder=imported.encoder,
        image_size=size,
        channels=channels,
        mean=imported.normalisation[0],
        std=imported.normalisation[1],
        method=imported.method_name,
        headline="class" if imported.method_name in ("dino", "timm") and encoder.has_class_token else "mean",
        step=0,
        epoch=0.0,
        run=out.name,
    )
    with staged(out) as folder:
        save_encoder(folder, encoder.state_dict(), card)
        if imported.method:
            method = {key: value.contiguous() for key, value in imported.method.items()}
            save_file(method, folder / "method.safetensors")
        write_json(
            folder / "import.json",
            {
                "file": str(file), "as": layout, "resized": fitted.resized, "left": imported.left,
                "encoder_keys": len(imported.weights), "method_keys": sorted(imported.method),
            },
        )  # fmt: skip
    return imported


def _normalisation(
    imported: Imported, channels: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std as given, else the layout's."""
    if (mean is None) != (std is None):
        raise ValueError("--mean and --std go together: give both or neither")
    if mean is None or std is None:
        if channels != 3:
            raise ValueError(
                f"the checkpoint takes {channels} channels; give the mean and deviation it was trained with (--mean, "
                "--std), of pixels in 0 .. 1"
            )
        return imported.normalisation
    for option, values in (("--mean", mean), ("--std", std)):
        if len(values) != channels:
            raise ValueError(f"{option} has {len(values)} values and the checkpoint takes {channels} channels")
    if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
        raise ValueError(
            f"--mean {mean} and --std {std} are to be of pixels in 0 .. 1; divide those of 0 .. 255 by 255"
        )
    return mean, std


def describe(imported: Imported, out: Path) -> str:
    """What was imported and what was left, for people."""
    config = imported.encoder
    shape = ", ".join(
        f"{key} {value}" for key, value in TypeAdapter(type(config)).dump_python(config).items() if value is not None
    )
    mean, std = imported.normalisation
    lines = [
        f"{out}: {shape}",
        f"{len(imported.weights)} tensors of the encoder",
        f"pixels in 0 .. 1, minus mean {mean}, by std {std}; others: --mean, --std",
    ]
    lines += [f"resized: {key} ({shapes})" for key, shapes in imported.resized.items()]
    if imported.method:
        lines.append(f"{len(imported.method)} of its method (in method.safetensors): {', '.join(imported.method)}")
    reasons: dict[str, list[str]] = {}
    for key, why in imported.left.items():
        reasons.setdefault(why, []).append(key)
    for why, keys in reasons.items():
        more = f" and {len(keys) - 4} more (in import.json)" if len(keys) > 4 else ""
        lines.append(f"left out, {why}: {', '.join(keys[:4])}{more}")
    return "\n".join(lines)


def read_tensors(file: Path) -> Any:
    """A checkpoint's contents, tensors and plain values only: no code of the file is run."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # what official checkpoints hold beside tensors: the command line, and SimMIM's and Swin's configuration, of
        # yacs' class, a dictionary; torch's unpickler fills no subclass of dict but this one
        with torch.serialization.safe_globals([argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle's, zip's and its own errors for files it will not read
        raise ValueError(
            f"{file} can't be read as tensors ({type(error).__name__}: {_reason(error)}). Is the file whole? Files "
            "that hold objects of other code are refused; where you trust one, save only its state dict with "
            "safetensors"
        ) from error


def _reason(error: Exception) -> str:
    """What is wrong, without torch's advice to read the file with code in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("GLOBAL", "Unsupported", "Trying", "Can only"))]
    return (told or lines or ["no message"])[0][:200]


def _told(error: ValidationError) -> str:
    return error.errors()[0]["msg"].removeprefix("Value error, ")


class _State:
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
            raise ValueError(f"{inferred.family}: {_told(error)}") from None

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


def _channels(weights: State) -> int:
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


def _grid(config: EncoderConfig, size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // config.patch, size[1] // config.patch


def _heads(dim: int) -> int:
    """Qkv weights do not tell the number of heads: that of the published size, or a head is 64 wide (ViT and PVT)."""
    published = {width: heads for width, _, heads in VIT_SIZES.values()}
    return published.get(dim) or max(1, dim // 64)


def _vit(state: _State, method: str, *, sincos: bool = False) -> Imported:
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


def read_mae(state: _State) -> Imported:
    """{"model": timm's ViT names, decoder_*, mask_token of the decoder} (He et al. 2022)."""
    state.drop_prefix("module.")
    state.leave("^decoder_pos_embed$", "fixed sin-cos positions, computed")
    decoder = state.take("decoder_", "mask_token")
    imported = _vit(state, "mae", sincos=True)
    grid = _grid(imported.encoder, imported.image_size)
    fixed = sincos_positions(imported.encoder.shape[0], grid)
    if not torch.allclose(imported.weights["pos_embed"][:, -len(fixed) :], fixed[None], atol=1e-4):
        imported.encoder = dataclasses.replace(imported.encoder, positions="learned")
    imported.method = decoder
    return imported


def read_dino(state: _State) -> Imported:
    """{"student", "teacher"} with `module.` and `backbone.` prefixes and head.*, or a backbone alone."""
    state.drop_prefix("module.")
    head = {}
    if any(key.startswith("backbone.") for key in state.tensors):
        head = state.take("head.")
        state.drop_prefix("backbone.")
    imported = _vit(state, "dino")
    imported.method = head
    return imported


def read_dinov2(state: _State) -> Imported:
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


def read_beit(state: _State) -> Imported:
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


def _beit(state: _State) -> Imported:
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


def read_simmim(state: _State) -> Imported:
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


def _swin(state: _State, method: str = "mim") -> Imported:
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


def _coordinates_window(state: _State, tables: State, block: str) -> int:
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


def read_um_mae(state: _State) -> Imported:
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


def read_pvt(state: _State) -> Imported:
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


def read_timm(state: _State) -> Imported:
    """A timm ViT, DeiT, BEiT or Swin, told apart by its names."""
    if any(key.startswith("layers.") for key in state.tensors):
        return _swin(state, "timm")
    if any(key.endswith("attn.q_bias") for key in state.tensors):
        imported = _beit(state)
        imported.method_name, imported.normalisation = "timm", INCEPTION
        return imported
    return _vit(state, "timm")


LAYOUTS: dict[str, Callable[[_State], Imported]] = {
    "mae": read_mae,
    "dino": read_dino,
    "beit": read_beit,
    "simmim": read_simmim,
    "um_mae": read_um_mae,
    "dinov2": read_dinov2,
    "pvt": read_pvt,
    "timm": read_timm,
}
