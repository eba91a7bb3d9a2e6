"""Where a tokenizer lies and what it says of itself (imports no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter

from data_pipelines.files import read_json
from pretrain.config import EncoderConfig
from pretrain.encoder_folder import is_tokenizer
from pretrain.methods.mask_counts import mask_grid
from pretrain.methods.registry import MethodConfig, exporting

if TYPE_CHECKING:
    from pretrain.config import Config


@dataclass(frozen=True)
class TokenizerCard:
    """What a saved tokenizer is, which images it was trained on, and how it came about."""

    kind: str  # the method that trained it
    vocab_size: int
    stride: int  # px of a code
    channels: int
    image_size: tuple[int, int]  # h, w in px
    mean: tuple[float, ...] | None  # of pixels in 0 .. 1; None: dvae's own map of them, .8 x + .1
    std: tuple[float, ...] | None
    method: MethodConfig
    encoder: EncoderConfig | None
    step: int
    epoch: float
    run: str
    bits: Literal[8, 16] = 8  # of a channel of the images


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer folder that `folder` is or holds: a run's final one, or else its latest checkpoint's.

    Raises FileNotFoundError where there is none, saying what there is.
    """
    candidates = [folder, folder / "tokenizer"]
    latest = folder / "checkpoints" / "latest"
    if latest.is_file():
        candidates.append(latest.parent / latest.read_text(encoding="utf-8").strip() / "tokenizer")
    for candidate in candidates:
        if is_tokenizer(candidate):
            return candidate
    methods = " or ".join(exporting("tokenizer"))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; a tokenizer is the run of method {methods}, or its tokenizer/ folder"
        )
    found = sorted(path.name for path in folder.iterdir())
    raise FileNotFoundError(
        f"no tokenizer in {folder}: it holds {', '.join(found[:10]) or 'nothing'}. A run of method {methods} has "
        "one in tokenizer/ from its first checkpoint on (see checkpoint.every_steps)"
    )


def read_card(folder: Path) -> TokenizerCard:
    """The card in a tokenizer folder."""
    described = read_json(folder / "config.json")
    return TypeAdapter(TokenizerCard).validate_python(described)


def check_codes(config: Config) -> None:
    """Raise ValueError unless the codes that a run is to predict are there and lie on its mask's grid."""
    method, target_crop = config.method, config.views.target_crop
    if method.tokenizer is None or target_crop is None:
        return
    try:
        folder = find_tokenizer(Path(method.tokenizer).expanduser())
    except FileNotFoundError as error:
        raise ValueError(f"method.tokenizer: {error}") from None
    card, size = read_card(folder), target_crop.size
    if card.channels != config.data.channels:
        raise ValueError(
            f"method.tokenizer {folder} reads images of {card.channels} channels and data.channels is "
            f"{config.data.channels}; they must be equal"
        )
    grid = mask_grid(method.mask, config.views.global_size)
    wanted = (grid[0] * card.stride, grid[1] * card.stride)
    if size != wanted:
        raise ValueError(
            f"views.target_crop is {size[0]}x{size[1]} px and the tokenizer's stride {card.stride} px, but the mask's "
            f"grid is {grid[0]}x{grid[1]} units and each needs one code: set views.target_crop.size="
            f"{wanted[0] if wanted[0] == wanted[1] else list(wanted)}, or another method.mask.unit"
        )
