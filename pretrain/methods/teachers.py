"""What an encoder that teaches another must be, told before anything starts."""

from __future__ import annotations

from pathlib import Path

from pretrain.encoder_folder import TIMM_PREFIX, find_encoder
from pretrain.encoders.saved import read_card
from pretrain.encoders.timm.config import TimmConfig
from pretrain.encoders.timm.survey import survey, why_not_size


def check_teacher(name: str, size: tuple[int, int], where: str, channels: int, map_for: str | None) -> None:
    """Raise ValueError unless the encoder `name` is there and has features of images of `size` (h, w px).

    where: the setting that has that size. map_for: who needs a map of its tokens; None: nobody.
    """
    timm_config, built_for = None, size
    try:
        if name.startswith(TIMM_PREFIX):
            timm_config = TimmConfig(model=name.removeprefix(TIMM_PREFIX))
            reads = survey(timm_config, size).channels
        else:
            card = read_card(find_encoder(Path(name).expanduser()))
            reads, built_for = card.channels, card.image_size
            if isinstance(card.encoder, TimmConfig):
                timm_config = card.encoder
            elif any(side % card.encoder.stride for side in size):
                raise ValueError(
                    f"its tokens are {card.encoder.stride} px, which do not divide {where} of "
                    f"{size[0]}x{size[1]} px; name another teacher or another size"
                )
        if reads != channels:
            raise ValueError(
                f"{name} reads images of {reads} channels and data.channels is {channels}; they must be equal"
            )
        if timm_config is not None:
            reason = why_not_size(timm_config, built_for, channels, size)
            if reason is None and map_for and survey(timm_config, built_for, channels).grid is None:
                reason = f"its features form no map, which {map_for} needs"
            if reason is not None:
                raise ValueError(f"{name} can't teach on {size[0]}x{size[1]} px: {reason}")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"method.teacher: {error}") from None
