"""I-JEPA against recorded values; see test_parity.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from einops import rearrange
from parity_files import imported, recorded, relative_error
from test_parity import AS_IT_IS, TIMELINE
from torch.nn import functional as F

from pretrain.encoders import build_encoder
from pretrain.encoders.base import Mask
from pretrain.methods.ijepa.config import IjepaConfig
from pretrain.methods.ijepa.masks import plan
from pretrain.methods.ijepa.method import Ijepa


def test_ijepa(tmp_path: Path) -> None:
    record = recorded("ijepa.pt")
    state, config = record["state_dict"], record["config"]["predictor"]
    wrapped = {part: {} for part in ("encoder", "target_encoder", "predictor")}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        wrapped[part][f"module.{rest}"] = value
    encoder, found = imported(wrapped, "ijepa", tmp_path, "heads=2", which="student")
    teacher = build_encoder(encoder.config, (64, 64))
    settings = IjepaConfig(
        predictor_dim=config["predictor_embed_dim"], predictor_depth=config["depth"], predictor_heads=2
    )
    method = Ijepa(settings, encoder, teacher, (8, 8), (3, 0), AS_IT_IS, TIMELINE)
    assert not method.load_state_dict(found.method, strict=False).unexpected_keys
    torch.testing.assert_close(method.predictor.positions, state["predictor.predictor_pos_embed"][0])
    theirs, _ = imported(wrapped, "ijepa", tmp_path / "teacher", "heads=2", which="teacher")
    method.teacher.load_state_dict(theirs.state_dict())

    images, outputs = record["inputs"]["x"], record["outputs"]
    drop = torch.ones(3, 64, dtype=torch.bool).scatter(1, record["inputs"]["context_indices"][0], False)
    drop = rearrange(drop, "b (h w) -> b h w", h=8)
    wanted = torch.stack(record["inputs"]["target_indices"], dim=1)
    whole = method.targets(method.teacher(images).tokens)
    torch.testing.assert_close(whole, outputs["teacher_normalised"], atol=1e-4, rtol=0)
    predicted = method.predict(images, Mask(drop=drop), wanted)
    block_major = rearrange(predicted, "b (n m) d -> (n b) m d", n=4)
    torch.testing.assert_close(block_major, outputs["predicted"], atol=1e-4, rtol=0)
    loss = F.smooth_l1_loss(block_major, outputs["target"])
    assert loss.item() == pytest.approx(float(record["loss"]), rel=1e-5)
    loss.backward()
    ours = dict(method.named_parameters())
    for name, gradient in record["grads"].items():
        name = name.replace("predictor.predictor_", "predictor.").replace("encoder.", "encoder.vit.", 1)
        assert relative_error(ours[name].grad, gradient) < 1e-3, name


@pytest.mark.parametrize("name", ["vith14_224", "vith16_448"])
def test_masks_are_drawn_as_the_authors_draw_them(name: str) -> None:
    record = recorded("ijepa_masks.pt")
    config, theirs = record["config"][name], record["outputs"][name]
    grid, batch = tuple(config["grid"]), config["batch"]
    plans = [plan(IjepaConfig(sampling="as_published"), grid, batch, 0, step) for step in range(60)]
    targets = torch.tensor([each.target[0] * each.target[1] for each in plans]).float()
    recorded_targets = torch.tensor(theirs["target_kept_per_batch"]).float()
    assert recorded_targets.min() >= targets.min()
    assert recorded_targets.max() <= targets.max()
    contexts = torch.tensor([each.count for each in plans]).float()
    spread = contexts.std() * len(theirs["context_kept_per_batch"]) ** -0.5
    assert abs(contexts.mean() - torch.tensor(theirs["context_kept_per_batch"]).float().mean()) < 4 * spread
    for each in plans:
        assert not each.context[:, -1].any()
        assert not each.context[:, :, -1].any()
        assert int(each.corners[..., 0].max()) + each.target[0] < grid[0]
