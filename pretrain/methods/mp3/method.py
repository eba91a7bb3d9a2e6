"""MP3, position prediction as pretraining (Zhai et al. 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.config import Config
from pretrain.encoders import Encoder, Mask, build_encoder
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Method, Normalisation
from pretrain.methods.mp3.config import Mp3Config, counts


def build(config: Config, normalisation: Normalisation, timeline: Timeline) -> PositionPrediction:
    """MP3 around the configuration's encoder."""
    assert config.encoder is not None
    encoder = build_encoder(config.encoder, config.views.global_size, config.data.channels, frames=config.data.frames)
    return PositionPrediction(config.method, encoder, config.views.global_size, normalisation, timeline)


class PositionPrediction(Method):
    """Tokens that are told no position attend to a random few; a linear layer says of each where it belongs.

    loss = cross-entropy over the n positions of an image, mean over the tokens without position, which are equally many
    in every image, so that the mean is global.
    """

    def __init__(
        self,
        config: Mp3Config,
        encoder: Encoder,
        image_size: tuple[int, int],
        normalisation: Normalisation,
        timeline: Timeline,
    ) -> None:
        super().__init__(normalisation, timeline)
        self.config, self.encoder = config, encoder
        self.num_positions = (image_size[0] // encoder.stride) * (image_size[1] // encoder.stride)
        unseen, self.num_placeless = counts(config, self.num_positions)
        self.num_seen = self.num_positions - unseen
        self.head = nn.Linear(encoder.dim, self.num_positions)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        logits = self.logits(self.normalise(batch["global_crops"][:, 0]), batch["unseen_mask"], batch["placeless_mask"])
        asked = Mask(~batch["placeless_mask"], num_visible=self.num_placeless).visible_ids()
        found = logits.gather(1, repeat(asked, "b m -> b m k", k=self.num_positions)).float()
        loss = F.cross_entropy(rearrange(found, "b m k -> (b m) k"), rearrange(asked, "b m -> (b m)"))
        with torch.no_grad():
            accuracy = (found.argmax(dim=-1) == asked).float().mean()
        return {"loss": loss, "position_accuracy": accuracy}

    def logits(self, images: Tensor, unseen: Tensor, placeless: Tensor) -> Tensor:
        """(b, n, n) of every token for every position, from (b, c, h, w) images and two maps (b, gh, gw) bool."""
        assert self.encoder is not None
        mask = Mask(unseen=unseen, placeless=placeless, keys=self.config.keys, num_visible=self.num_seen)
        logits: Tensor = self.head(self.encoder(images, mask).tokens)
        return logits
