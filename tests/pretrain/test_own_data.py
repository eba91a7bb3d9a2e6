from __future__ import annotations

from dataclasses import replace

import pytest

from data_pipelines.packing.inspect_images import ImagesSummary, Sides
from pretrain.config.load import ConfigError, load_config
from pretrain.config.overrides import written
from pretrain.config.own_data import Start, choose, choose_method, start_of_timm, warnings_of

PHOTOS = ImagesSummary(
    number=242,
    splits={"train": 242},
    classes=None,
    looked_at=200,
    short_side=Sides(200, 330, 375, 400, 500),
    long_side=Sides(300, 450, 500, 500, 600),
    channels={3: 200},
    bits_stored=8,
    bits_used=8,
    largest_level=255,
    tone_spread=0.13,
    formats={"JPEG": 200},
    unreadable=(),
    num_unreadable=0,
)


def config_of(images: ImagesSummary, device, method, **more):
    choice = choose(images, device, method, **more)
    return load_config(choice.preset, [f"{k}={written(v)}" for k, v in choice.settings.items()] + ["data.train=x"])


@pytest.mark.parametrize(
    ("number", "channels", "device", "method"),
    [
        (242, {3: 9}, "cpu", "mae"),
        (1_000_000, {3: 9}, "cpu", "mae"),
        (4_999, {3: 9}, "cuda", "mae"),
        (5_000, {3: 9}, "cuda", "dino"),
        (5_000, {1: 9}, "cuda", "dino"),
        (5_000, {13: 9}, "cuda", "mae"),
    ],
)
def test_the_method_follows_number_channels_and_device(number, channels, device, method) -> None:
    assert choose_method(replace(PHOTOS, number=number, channels=channels), device)[0] == method


def test_few_photographs_on_a_cpu() -> None:
    config = config_of(PHOTOS, "cpu", "mae")
    assert (config.train.batch_size, config.train.epochs) == (32, 200)
    assert [crop.size for crop in config.views.global_crops] == [(96, 96)]
    assert (config.encoder.size, config.encoder.depth, config.encoder.patch) == ("tiny", 6, 8)
    assert config.engine.precision == "fp32"


def test_many_photographs_on_gpus() -> None:
    config = config_of(replace(PHOTOS, number=100_000), "cuda", "dino", world_size=3)
    assert (config.train.batch_size, config.train.epochs) == (255, 100)
    assert [crop.size for crop in config.views.global_crops] == [(224, 224)] * 2
    assert config.views.local_crops.size == (96, 96)
    assert config.engine.precision == "bf16"


@pytest.mark.parametrize("number", [1, 2, 3, 7, 64, 242, 10**7])
@pytest.mark.parametrize("method", ["mae", "dino"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("side", [5, 32, 71, 200, 4000])
def test_any_images_give_settings_that_are_allowed(number: int, method, device, side: int) -> None:
    config = config_of(replace(PHOTOS, number=number, short_side=Sides(*[side] * 5)), device, method)
    assert config.train.batch_size <= max(number, 1)
    assert config.views.global_crops[0].size[0] % config.encoder.patch == 0


@pytest.mark.parametrize(
    ("channels", "bits", "expected"),
    [({1: 9}, 16, (1, 16)), ({3: 9}, 8, (3, 8)), ({1: 5, 3: 4}, 8, (3, 8)), ({13: 9}, 16, (13, 16))],
)
def test_channels_and_depth_are_those_of_the_files(channels, bits: int, expected) -> None:
    config = config_of(replace(PHOTOS, channels=channels, bits_stored=bits), "cpu", "mae")
    assert (config.data.channels, config.data.bits) == expected


def test_colours_are_changed_only_of_images_that_differ_by_more() -> None:
    photographs = config_of(PHOTOS, "cuda", "dino").views
    published = load_config("dino_vits16_in1k_100", ["data.train=x"]).views
    assert photographs.global_crops == published.global_crops
    assert photographs.local_crops == published.local_crops
    for alike in (replace(PHOTOS, tone_spread=0.025), replace(PHOTOS, channels={1: 9})):
        views = config_of(alike, "cuda", "dino").views
        crops = (*views.global_crops, views.local_crops)
        assert all(max(crop.jitter) == crop.grayscale == crop.blur == crop.solarise == 0 for crop in crops)
        assert views.global_crops[0].scale == (0.5, 1.0)


def test_a_run_that_goes_on_from_weights_takes_their_encoder() -> None:
    encoder = {"family": "vit", "size": "tiny", "depth": 2, "patch": 4}
    config = config_of(PHOTOS, "cuda", "mae", start=Start(encoder, 32, 4))
    assert (config.encoder.depth, config.views.global_crops[0].size, config.method.mask.unit) == (2, (32, 32), 4)
    start = start_of_timm("timm:vit_small_patch16_224.augreg_in21k")
    assert start == Start({"family": "vit", "size": "small", "patch": 16}, 224, 16)
    assert start_of_timm("timm:resnet50") is None


def test_crops_far_smaller_than_the_images_are_told_of() -> None:
    (line,) = warnings_of(PHOTOS, crop=32, channels=3, bits=8)
    assert "375 px or more, and crops are 32 px: the encoder sees them at 1/11 of their size" in line
    assert warnings_of(PHOTOS, crop=96, channels=3, bits=8) == []


def test_images_of_other_channels_are_told_of() -> None:
    mixed = replace(PHOTOS, channels={1: 9, 3: 100, 5: 1})
    grey, more = warnings_of(mixed, crop=96, channels=3, bits=8)
    assert grey == "images become RGB: 9 of 200 have 1 channel"
    assert more.startswith("1 of 200 have 5 channels, which a run of 3 cannot use")


def test_depth_is_told_of_where_a_run_loses_it_and_where_files_do_not_use_it() -> None:
    scans = replace(PHOTOS, channels={1: 200}, bits_stored=16, bits_used=12, largest_level=4095)
    (lost,) = warnings_of(scans, crop=224, channels=1, bits=8)
    assert "16 grey levels of 4,096. Set data.bits=16" in lost
    (kept,) = warnings_of(scans, crop=224, channels=1, bits=16)
    assert "16 bits a channel and use 12 of them (largest level 4,095)" in kept


def test_the_old_name_of_a_preset_is_refused_with_the_new_one() -> None:
    with pytest.raises(ConfigError, match="dino_vits16_own_data is called dino_own_data now"):
        load_config("dino_vits16_own_data", ["data.train=x"])
