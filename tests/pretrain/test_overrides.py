"""What is written on the command line, and what a configuration makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.config.load import ConfigError, load_config, load_noting


def load(preset: str, *overrides: str) -> Any:
    return load_config(preset, ["data.train=x", *overrides])


@pytest.mark.parametrize("text", ["on", "no", "2024", "1e3", "010", "0x1f", "1_000", "2024-01-01", "12.50", "1.2.3"])
def test_a_name_is_text_whatever_it_looks_like(tmp_path: Path, text: str) -> None:
    assert load("mae_vit_cifar_cpu", f"name={text}").name == text
    assert load("mae_vit_cifar_cpu", f"tracking.tags=[{text}, b]").tracking.tags == (text, "b")
    assert load("mae_vit_cifar_cpu", f"tracking.notes={text}").tracking.notes == text
    assert load_config("mae_vit_cifar_cpu", [f"data.train={text}"]).data.train == text
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: mae_vit_cifar_cpu\nname: {text}\ntracking: {{tags: [{text}], group: {text}}}\n")
    config = load(str(file))
    assert (config.name, config.tracking.tags, config.tracking.group) == (text, (text,), text)


def test_text_may_hold_what_yaml_would_read_otherwise() -> None:
    for given, meant in (("a: b", "a: b"), ("[draft", "[draft"), ("'on'", "on"), ("null", None), ("it's", "it's")):
        assert load("mae_vit_cifar_cpu", f"tracking.notes={given}").tracking.notes == meant


def test_numbers_stay_numbers() -> None:
    config = load("mae_vit_cifar_cpu", "optim.lr=1e-3", "seed=2", "train.epochs=3")
    assert (config.optim.lr, config.seed, config.train.epochs) == (1e-3, 2, 3)


def test_a_key_below_a_list_sets_that_of_every_item() -> None:
    config, notes = load_noting("dino_vit_cifar_cpu", ["data.train=x", "views.global_crops.size=64"])
    assert [crop.size for crop in config.views.global_crops] == [(64, 64), (64, 64)]
    assert notes == [
        "views.global_crops.size=64 sets that of all 2 of views.global_crops; "
        "of one alone: views.global_crops.0.size=..."
    ]


@pytest.mark.parametrize("key", ["image_size", "crop_size"])
def test_a_size_for_short_sets_the_crops_that_the_encoder_sees(key: str) -> None:
    config, notes = load_noting("dino_vit_cifar_cpu", ["data.train=x", f"{key}=64"])
    assert [crop.size for crop in config.views.global_crops] == [(64, 64), (64, 64)]
    assert config.views.local_crops is not None
    assert config.views.local_crops.size == (16, 16)
    assert notes == [f"{key}=64 sets views.global_crops.size=64; as it was: views.local_crops.size=16"]


def test_the_target_crop_keeps_its_proportion() -> None:
    config = load("beit_vitb16_in1k_800", "image_size=448", "method.tokenizer=t")
    assert config.views.target_crop.size == (224, 224)
    assert load("beit_vitb16_in1k_800", "image_size=[224, 448]", "method.tokenizer=t").views.target_crop.size == (
        112,
        224,
    )


def test_what_is_set_by_its_own_name_counts_more_than_a_shortcut() -> None:
    config = load("mae_vit_cifar_cpu", "views.global_crops.0.size=32", "image_size=64")
    assert config.views.global_size == (32, 32)


@pytest.mark.parametrize("given", ["64x64", "6.5", "[64]", "true", "-4"])
def test_a_size_is_a_number_or_two(given: str) -> None:
    with pytest.raises(ConfigError, match="a whole number of px, or"):
        load("mae_vit_cifar_cpu", f"image_size={given}")


def test_another_family_drops_what_it_has_not_and_says_so() -> None:
    given = ["data.train=x", "views.local_crops.size=32", "encoder.window=4", "encoder.family=swin", "image_size=64"]
    config, notes = load_noting("dino_vit_cifar_cpu", given)
    assert (config.encoder.family, config.encoder.size, config.encoder.patch, config.encoder.window) == (
        "swin",
        "tiny",
        4,
        4,
    )  # type: ignore[union-attr]
    assert notes[0] == (
        "encoder.family is swin instead of vit; these settings of the preset went with it: dim=128, depth=4, heads=4, "
        "patch=8, stem=conv, class_token=false, pool=mean; kept: size=tiny "
        "(`selfsight settings encoder --of swin` shows what it has)"
    )
    assert load("dino_vit_cifar_cpu", *given[1:4], "image_size=64", "encoder=swin").encoder.family == "swin"


def test_families_of_one_shape_keep_it() -> None:
    encoder = load("dino_vit_cifar_cpu", "encoder.family=beit").encoder
    assert (encoder.dim, encoder.depth, encoder.heads, encoder.patch, encoder.pool) == (128, 4, 4, 8, "mean")


def test_another_method_keeps_the_mask() -> None:
    method = load("mae_vit_cifar_cpu", "method.name=mim").method
    assert (method.name, method.mask.ratio, method.mask.unit) == ("mim", 0.75, 4)


def test_a_refusal_behind_another_family_says_what_changed() -> None:
    with pytest.raises(ConfigError, match=r"stride is 32(.|\n)*encoder.family is swin instead of vit"):
        load("dino_vit_cifar_cpu", "encoder.family=swin")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("learning_rate=1", "did you mean optim.lr?"),
        ("lr=1", "did you mean optim.lr?"),
        ("epochs=1", "did you mean train.epochs?"),
        ("batch_size=1", "did you mean train.batch_size?"),
        ("Batch-Size=1", "did you mean train.batch_size?"),
        ("data.num_workers=1", "did you mean data.workers?"),
        ("threads=1", "did you mean data.threads or engine.threads?"),
        ("train.epoch=1", "did you mean train.epochs?"),
        ("encoder.lr=1", "did you mean optim.lr?"),
        ("prototypes=1", r"did you mean method.prototypes \(of method dino\)"),
        ("method.prototypes=1", "belongs to method dino, and the method here is mae"),
        (
            "encoder.window=1",
            "belongs to encoder swin and swin_moe and twins and um_mae_swin, and the encoder here is vit",
        ),
        ("encoder.family=swim", "encoder.family: there is no 'swim', .*; did you mean swin?"),
        ("train.accumulation=2", "train.accumulation is called train.grad_accum_steps now"),
        ("views.global_crops.0.grey=0.5", "is called views.global_crops.grayscale now"),
        ("method.vocabulary=9", "is called method.vocab_size now"),
        ("tracking.tags=on", r"this takes a list, such as \[on\]"),
    ],
)
def test_a_key_that_there_is_not_is_answered_with_one_that_there_is(given: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load("mae_vit_cifar_cpu", given)
