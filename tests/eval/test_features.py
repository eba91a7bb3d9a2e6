"""Features of every kind of encoder: which columns are what, in which order, and what is refused."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.datasets.dataset import open_dataset
from eval.features import centred, extract, pixels
from pretrain.encoders import build_encoder
from pretrain.encoders.swin.config import SwinConfig
from pretrain.encoders.vit.config import VitConfig

NORM = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "progress": False}


@pytest.fixture
def dataset(tmp_path, write_shard):
    write_shard(tmp_path / "train-000000.tar", [0, 1, None, 2, 1])
    write_shard(tmp_path / "train-000001.tar", [2, None, 0], seed=1)
    return open_dataset(tmp_path, "train")


def vit(**changes):
    torch.manual_seed(0)
    return build_encoder(VitConfig(size="tiny", dim=12, depth=5, heads=2, patch=4, **changes), (16, 16), 3)


def normalised(dataset, rows):
    stacked = torch.stack(
        [torch.from_numpy(np.array(Image.open(io.BytesIO(dataset.read(row).image)))).movedim(-1, 0) for row in rows]
    )
    shift, scale = (torch.tensor(NORM[name])[:, None, None] for name in ("mean", "std"))
    return (stacked / 255 - shift) / scale


def test_class_token_encoder(dataset):
    encoder = vit().eval()
    features = extract(encoder, dataset, size=16, batch_size=2, **NORM)
    assert features.labels.tolist() == [0, 1, 2, 1, 2, 0]
    assert features.ids.tolist() == [0, 1, 3, 4, 5, 7]
    with torch.no_grad():
        expected = encoder(normalised(dataset, [0, 1, 3, 4, 5, 7]), layers=(1, 2, 3, 4))
    mean, tokens = expected.tokens.mean(dim=1), [layer.prefix_tokens[:, 0] for layer in expected.layers]
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(features.inputs["class"], tokens[-1], **close)
    torch.testing.assert_close(features.inputs["mean"], mean, **close)
    torch.testing.assert_close(features.inputs["class + mean"], torch.cat([tokens[-1], mean], 1), **close)
    torch.testing.assert_close(features.inputs["class of last 4"], torch.cat(tokens, 1), **close)
    torch.testing.assert_close(features.inputs["class of last 4 + mean"], torch.cat([*tokens, mean], 1), **close)
    assert len(features.inputs) == 5
    assert features.pooled_as == "class"
    assert not features.inputs["class"].requires_grad


def test_without_a_class_token_the_mean_stands_in(dataset):
    features = extract(vit(class_token=False, pool="mean"), dataset, size=16, **NORM)
    assert {name: values.shape[1] for name, values in features.inputs.items()} == {"mean": 12, "mean of last 4": 48}
    assert features.pooled_as == "mean"


def test_a_pyramid_gives_the_blocks_of_its_last_stage(dataset):
    torch.manual_seed(0)
    encoder = build_encoder(SwinConfig(dim=8, depths=(2, 2), heads=(1, 2), patch=2, window=4), (16, 16), 3)
    features = extract(encoder, dataset, size=16, **NORM)
    assert {name: values.shape[1] for name, values in features.inputs.items()} == {"mean": 16, "mean of last 2": 32}


def test_a_pooling_of_its_own_is_one_more_input(dataset):
    encoder = vit()
    plain = encoder.forward

    def forward(images, mask=None, layers=()):
        features = plain(images, mask, layers)
        return features._replace(pooled=features.tokens.amax(dim=1))

    encoder.forward = forward
    features = extract(encoder, dataset, size=16, **NORM)
    assert features.pooled_as == "pooled"
    assert features.inputs["pooled"].shape == (6, 12)


def test_batch_size_changes_nothing(dataset):
    sets = [extract(vit(), dataset, size=16, batch_size=size, **NORM) for size in (1, 100)]
    torch.testing.assert_close(sets[0].inputs["class of last 4 + mean"], sets[1].inputs["class of last 4 + mean"])


def test_pixels_and_their_centre(dataset):
    features = pixels(dataset, 16, progress=False)
    assert features.inputs["pixels"].shape == (6, 3 * 16 * 16)
    assert 0 <= float(features.inputs["pixels"].min()) <= float(features.inputs["pixels"].max()) <= 1
    shifted = replace(features, inputs={"pixels": features.inputs["pixels"] + 1})
    train, val = centred(features, shifted)
    torch.testing.assert_close(train.inputs["pixels"].mean(dim=0), torch.zeros(768), rtol=0, atol=1e-5)
    torch.testing.assert_close(val.inputs["pixels"].mean(dim=0), torch.ones(768), rtol=0, atol=1e-5)


def test_unlabelled_data_are_refused(tmp_path, write_shard):
    write_shard(tmp_path / "train-000000.tar", [None] * 4)
    with pytest.raises(ValueError, match="none of the 4 samples has a label"):
        pixels(open_dataset(tmp_path, "train"), 16, progress=False)
