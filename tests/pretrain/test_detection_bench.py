"""What tests/bench/detection.py measures with: boxes of the built-in numerals, a step on them, AP by pycocotools."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from data_pipelines.scenes import build_scenes
from pretrain.encoders import build_encoder
from pretrain.encoders.saved import EncoderCard, save_encoder
from pretrain.encoders.vit.config import VitConfig

pytest.importorskip("pycocotools", reason="needs pip install 'selfsight[detection]'")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = spec_from_file_location("detection", Path(__file__).parents[1] / "bench" / "detection.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Told(nn.Module):
    """A detector that gives the same for each image, one after the other."""

    def __init__(self, answers: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.answers = iter(answers)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [next(self.answers) for _ in images]


def test_a_detector_of_the_numerals_takes_a_step_and_is_scored(bench: ModuleType, tmp_path: Path) -> None:
    rows = bench.read(build_scenes(tmp_path / "images", 0, 3, 1, bench.SIDE) / "train")
    assert [tuple(image.shape) for image, _ in rows] == [(3, 96, 96)] * 3
    truth = [target | {"scores": torch.ones(len(target["labels"]))} for _, target in rows]
    assert bench.average_precision(Told(truth), rows) == pytest.approx((100, 100))
    near = [target | {"boxes": target["boxes"] + torch.tensor([0, 0, 3, 0])} for target in truth]
    found = bench.average_precision(Told(near), rows)
    assert found[0] < 90
    assert found[1] == pytest.approx(100)
    none = [{key: value[:0] for key, value in target.items()} for target in truth]
    assert bench.average_precision(Told(none), rows) == (0.0, 0.0)

    config = VitConfig(dim=32, depth=1, heads=2, patch=8)
    card = EncoderCard(config, (32, 32), 3, (0.5,) * 3, (0.2,) * 3, "mae", "mean", 40, 1.25, "photos")
    save_encoder(tmp_path / "encoder", build_encoder(config, (32, 32)).state_dict(), card)
    ours, scratch = (bench.detector_of(tmp_path / "encoder", fresh, 0) for fresh in (False, True))
    differ = {name for name, value in ours.named_parameters() if not torch.equal(value, scratch.get_parameter(name))}
    assert differ
    assert all(name.startswith("backbone.encoder.") for name in differ)  # the encoder alone
    before = {name: value.clone() for name, value in ours.named_parameters()}
    assert bench.train(ours, rows, 1, 2, 1e-3, 0) > 0
    assert [name for name, value in ours.named_parameters() if torch.equal(value, before[name])] == []
