"""What each published preset resolves to, number by number, on ImageNet-1k."""

from __future__ import annotations

import re
from typing import Any

import pytest

from data_pipelines.transforms.config import Crop
from pretrain.config import Config
from pretrain.config.load import list_presets, load_config
from pretrain.engines.schedules import Timeline, learning_rate, weight_decay
from pretrain.interop.initialise import settings_of
from pretrain.methods.mask_counts import mask_grid, num_hidden

IMAGES = 1_281_167  # ImageNet-1k's training set

FLIP = "flip .5"
BEIT_COLOURS = "flip .5, jitter .4 .4 .4 0"
DINO_COLOURS = "flip .5, jitter .4 .4 .2 .1 p .8, grayscale .2, "

MAE = {
    # lr: at its peak after the scaling rule, and at the last step. decay: at the first step and the last.
    "lr": 2.4e-3,
    "last lr": 0.0,
    "warm-up epochs": 40,
    "betas": (0.9, 0.95),
    "decay": (0.05, 0.05),
    "clip": 0,
    "epochs": 800,
    "batch": 4096,
    "crops": [f"224 px .2-1 bicubic: {FLIP}"],
    "encoder": "vit base/16",
    "mask": "random, 147 of 14x14 units of 16 px",
    "decoder": "512 wide, 8 deep, 16 heads, normalised pixels",
}
MAE_HUGE = MAE | {"encoder": "vit huge/14", "mask": "random, 192 of 16x16 units of 14 px"}
UM_MAE = MAE | {
    "warm-up epochs": 10,
    "epochs": 200,
    "crops": [f"256 px .2-1 bicubic: {FLIP}"],
    "mask": "one_in_2x2, 192 of 16x16 units of 16 px, secondary 0.25",
    "decoder": "512 wide, 2 deep, 16 heads, normalised pixels",
}
SIMMIM = {
    "lr": 8e-4,
    "first lr": 4e-6,
    "last lr": 4e-5,
    "warm-up epochs": 10,
    "betas": (0.9, 0.999),
    "decay": (0.05, 0.05),
    "clip": 5,
    "epochs": 100,
    "batch": 2048,
    "encoder": "swin base/4 window 6",
    "crops": [f"192 px .67-1 bilinear: {FLIP}"],
    "mask": "random, 22 of 6x6 units of 32 px",
    "target": "pixels",
}
SIMMIM_800 = SIMMIM | {"lr": 4e-4, "first lr": 2e-6, "last lr": 4e-5, "steps": (0.1, 700), "epochs": 800}
BEIT = {
    "lr": 1.5e-3,
    "last lr": 1e-5,
    "warm-up epochs": 10,
    "betas": (0.9, 0.999),
    "decay": (0.05, 0.05),
    "clip": 3,
    "epochs": 800,
    "batch": 2048,
    "crops": [f"224 px .08-1 bicubic: {BEIT_COLOURS}"],
    "target crop": "112 lanczos",
    "encoder": "beit base/16 shared positions, layer scale .1, drop path .1",
    "target": "codes",
    "mask": "blockwise, 75 of 14x14 units of 16 px, blocks from 16, aspect from 0.3",
}
BEIT_2 = BEIT | {
    "epochs": 1600,
    "crops": [f"224 px .2-1 bicubic: {BEIT_COLOURS}"],
    "target crop": "224 bicubic",
    "aggregation": "2 blocks on layer 9",
}
DINO = {
    "lr": 1e-3,
    "last lr": 1e-6,
    "warm-up epochs": 10,
    "betas": (0.9, 0.999),
    "decay": (0.04, 0.4),
    "clip": 3,
    "epochs": 100,
    "batch": 512,
    "encoder": "vit small/16, drop path .1",
    "crops": [
        f"224 px .4-1 bicubic: {DINO_COLOURS}blur 1",
        f"224 px .4-1 bicubic: {DINO_COLOURS}blur .1, solarise .2",
        f"8 x 96 px .05-.4 bicubic: {DINO_COLOURS}blur .5",
    ],
    "head": "65536 prototypes, 2048, 256, norm fixed True, frozen for 1",
    "student temperature": 0.1,
    "teacher temperature": "0.04 to 0.04 in 0 epochs",
    "teacher momentum": 0.996,
    "centre": "center 0.9",
}
DINO_300 = DINO | {
    "lr": 2e-3,
    "epochs": 300,
    "batch": 1024,
    "teacher temperature": "0.04 to 0.07 in 30 epochs",
    "head": "65536 prototypes, 2048, 256, norm fixed False, frozen for 1",
}
DINO_800 = DINO_300 | {
    "last lr": 1e-5,
    "clip": 0,
    "epochs": 800,
    "crops": [
        f"224 px .25-1 bicubic: {DINO_COLOURS}blur 1",
        f"224 px .25-1 bicubic: {DINO_COLOURS}blur .1, solarise .2",
        f"10 x 96 px .05-.25 bicubic: {DINO_COLOURS}blur .5",
    ],
}

TUNED = {
    "lr": 2e-3,
    "last lr": 1e-6,
    "warm-up epochs": 5,
    "betas": (0.9, 0.999),
    "decay": (0.05, 0.05),
    "clip": 0,
    "epochs": 100,
    "batch": 1024,
    "layer decay": 0.65,
    "crops": [f"224 px .08-1 bicubic: {FLIP}"],
    "encoder": "vit base/16, drop path .1",
    "head": "norm after the mean, of .00002",
    "mixed": "mixup 0.8, cutmix 1.0, smoothed 0.1, batch",
    "augmented": "2 of 9.0 +- 0.5 with 0.5, more with more True, erased 0.25",
    "measured at": 256,
}
UM_MAE_TUNED = TUNED | {
    "layer decay": 0.85,
    "crops": [f"256 px .08-1 bicubic: {FLIP}"],
    "encoder": "um_mae_swin tiny/4 window 8, drop path .1",
    "head": "mean, of .00002",
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "finetune_mae_vitb16_in1k": TUNED,
    "finetune_mae_vitl16_in1k": TUNED
    | {"lr": 4e-3, "layer decay": 0.75, "epochs": 50, "encoder": "vit large/16, drop path .2"},
    "finetune_ummae_swint_in1k": UM_MAE_TUNED,
    "finetune_ummae_pvts_in1k": UM_MAE_TUNED | {"encoder": "pvt small/4 pool, drop path .1"},
    "finetune_simmim_swinb_in1k": TUNED
    | {
        "lr": 5e-3,
        "first lr": 1e-6,
        "warm-up epochs": 20,
        "clip": 5,
        "batch": 2048,
        "layer decay": 0.9,
        "encoder": "swin base/4 window 7, drop path .1",
        "head": "mean, of .02",
    },
    "finetune_beit_vitb16_in1k": TUNED
    | {
        "lr": 4e-3,
        "warm-up epochs": 20,
        "encoder": "beit base/16 shared positions, layer scale .1, drop path .1",
    },
    "finetune_simple_vits16_in1k": {key: value for key, value in TUNED.items() if key != "layer decay"}
    | {
        "lr": 1e-3,
        "last lr": 0.0,
        "warm-up epochs": 8,
        "decay": (0.1, 0.1),
        "clip": 1,
        "epochs": 90,
        "crops": [f"224 px .05-1 bilinear: {FLIP}"],
        "encoder": "vit small/16",
        "head": "mean, of 0",
        "mixed": "mixup 0.2, cutmix 0.0, smoothed 0.0, batch",
        "augmented": "2 of 10.0 +- 0.0 with 1.0, more with more False, erased 0.0",
    },
    "mae_vitb16_in1k_800": MAE,
    "mae_vitb16_in1k_1600": MAE | {"epochs": 1600},
    "mae_vitl16_in1k_800": MAE | {"encoder": "vit large/16"},
    "mae_vitl16_in1k_1600": MAE | {"encoder": "vit large/16", "epochs": 1600},
    "mae_vith14_in1k_800": MAE_HUGE,
    "mae_vith14_in1k_1600": MAE_HUGE | {"epochs": 1600},
    "ijepa_vith14_in1k_300": {
        "lr": 1e-3,
        "first lr": 2e-4,
        "last lr": 1e-6,
        "warm-up epochs": 40,
        "betas": (0.9, 0.999),
        "decay": (0.04, 0.4),
        "clip": 0,
        "epochs": 300,
        "batch": 2048,
        "crops": ["224 px .3-1 bilinear: flip 0"],
        "encoder": "vit huge/14",
        "blocks": "4 of 0.15-0.2, 0.75-1.5, in 0.85-1.0, fair",
        "predictor": "384 wide, 12 deep, 12 heads",
        "teacher momentum": 0.996,
    },
    "ummae_swint_in1k_200": UM_MAE | {"encoder": "um_mae_swin tiny/4 window 8"},
    "ummae_pvts_in1k_200": UM_MAE | {"encoder": "pvt small/4 pool"},
    "simmim_swinb_in1k_100": SIMMIM,
    "simmim_swinb_in1k_800": SIMMIM_800,
    "simmim_vitb16_in1k_800": SIMMIM_800
    | {
        "encoder": "beit base/16 shared positions, layer scale .1, drop path .1",
        "crops": [f"224 px .67-1 bilinear: {FLIP}"],
        "mask": "random, 30 of 7x7 units of 32 px",
    },
    "beit_vitb16_in1k_800": BEIT,
    "beit_vitl16_in1k_800": BEIT | {"encoder": "beit large/16 shared positions, layer scale .00001, drop path .1"},
    "beitv2_vitb16_in1k_1600": BEIT_2,
    "beitv2_vitb16_in1k_300": BEIT_2
    | {"epochs": 300, "betas": (0.9, 0.98), "encoder": "beit base/16 shared positions, layer scale .1"},
    "vqkd_vitb16_in1k_100": {
        "lr": 2e-4,
        "last lr": 1e-5,
        "warm-up epochs": 10,
        "betas": (0.9, 0.99),
        "decay": (1e-4, 1e-4),
        "clip": 0,
        "epochs": 100,
        "batch": 512,
        "crops": [f"224 px .08-1 bicubic: {FLIP}"],
        "encoder": "vit base/16",
        "codes": "8192 of 32, average 0.99, commitment 1.0, restarted below 0.0",
        "decoder": "768 wide, 3 deep, 12 heads",
    },
    "dvae_in1k": {
        **{
            "lr": 1e-4,
            "last lr": 1.25e-6,
            "warm-up epochs": 0,
            "betas": (0.9, 0.999),
            "decay": (1e-4, 1e-4),
            "clip": 0,
        },
        "batch": 512,
        "crops": [f"256 px .08-1 bicubic: {FLIP}"],
        "codes": "8192, 256 wide, 4 groups of 2",
        "temperature": "1.0 to 0.0625 in 150000",
        "divergence": "6.6 in 5000",
        "average": 0.999,
    },
    "dino_vits16_in1k_100": DINO,
    "dino_vits16_in1k_300": DINO_300,
    "dino_vits16_in1k_800": DINO_800,
    "dino_vits8_in1k_800": DINO_300
    | {
        "epochs": 800,
        "encoder": "vit small/8, drop path .1",
        "crops": [*DINO["crops"][:2], f"10 x 96 px .05-.4 bicubic: {DINO_COLOURS}blur .5"],
    },
    "dino_vitb16_in1k_100": DINO | {"lr": 2e-3, "batch": 1024, "encoder": "vit base/16, drop path .1"},
    "dino_vitb16_in1k_400": DINO_800
    | {
        "lr": 3e-3,
        "last lr": 2e-6,
        "clip": 0.3,
        "epochs": 400,
        "encoder": "vit base/16, drop path .1",
        "teacher temperature": "0.04 to 0.07 in 50 epochs",
        "head": "65536 prototypes, 2048, 256, norm fixed True, frozen for 3",
    },
    "dino_swint_in1k_300": DINO_300 | {"lr": 1e-3, "batch": 512, "encoder": "swin tiny/4 window 7, drop path .1"},
    "dinov2_vitl16_in1k": DINO
    | {
        # 100 epochs of theirs are 125,000 steps: 200 passes
        "lr": 4e-3 * 2**0.5,
        "warm-up epochs": 20,
        "epochs": 200,
        "batch": 2048,
        "teacher momentum": 0.992,
        "encoder": "vit large/16, layer scale .00001, drop path .3",
        "layer decay": 0.9,
        "patch embedding": 0.2,
        "teacher temperature": "0.04 to 0.07 in 60 epochs",
        "head": "65536 prototypes, 2048, 256, norm fixed True, frozen for 2",
        "koleo": 0.1,
        "ibot": "1.0, on 0.5 of the crops, 0.1 to 0.5 hidden, blocks from 4, separate head False",
        "crops": [
            f"224 px .32-1 bicubic: {DINO_COLOURS}blur 1",
            f"224 px .32-1 bicubic: {DINO_COLOURS}blur .1, solarise .2",
            f"8 x 96 px .05-.32 bicubic: {DINO_COLOURS}blur .5",
        ],
    },
}
PUBLISHED["dinov3_vitl16_in1k"] = PUBLISHED["dinov2_vitl16_in1k"] | {
    "lr": 1e-3 * 2**0.5,
    "encoder": "dinov3 large/16, layer scale .00001, drop path .3",
    "head": "65536 prototypes, 2048, 256, norm fixed False, frozen for 2",
    "centre": "sinkhorn 0.9",
    "ibot": "1.0, on 0.5 of the crops, 0.1 to 0.5 hidden, blocks from 4, separate head True",
}


def short(number: float) -> str:
    """.4 for 0.4, 1 for 1.0."""
    return f"{number:.6f}".rstrip("0").rstrip(".").removeprefix("0") or "0"


def crop(view: Crop) -> str:
    count = getattr(view, "count", None)
    assert view.size[0] == view.size[1]
    assert view.ratio == pytest.approx((3 / 4, 4 / 3))
    assert view.blur_radius == (0.1, 2.0)
    colours = [f"flip {short(view.flip)}"]
    if any(view.jitter):
        probability = "" if view.jitter_prob == 1 else f" p {short(view.jitter_prob)}"
        colours.append(f"jitter {' '.join(map(short, view.jitter))}{probability}")
    colours += [
        f"{name} {short(share)}" for name in ("grayscale", "blur", "solarise") if (share := getattr(view, name))
    ]
    where = f"{view.size[0]} px {'-'.join(map(short, view.scale))} {view.interpolation}"
    return (f"{count} x " if count else "") + f"{where}: {', '.join(colours)}"


def encoder(config: Config) -> str:
    ours = config.encoder
    text = f"{ours.family} {ours.size}/{ours.patch}"
    if ours.family in ("swin", "um_mae_swin"):
        text += f" window {ours.window}"
    if ours.family == "pvt":
        text += f" {ours.reduction}"
    if ours.family == "beit":
        assert not ours.absolute_positions
        text += f" {ours.relative_positions} positions"
    if getattr(ours, "layer_scale", None):
        text += f", layer scale {short(ours.layer_scale)}"
    return text + (f", drop path {short(ours.drop_path)}" if ours.drop_path else "")


def of_optim(config: Config) -> dict[str, Any]:
    timeline = Timeline.of(config.train, IMAGES // config.train.batch_size)
    rate, decay = learning_rate(config.optim, config.train.batch_size, timeline), weight_decay(config.optim, timeline)
    last = timeline.total_steps - 1
    assert max(map(rate, (rate.warmup_steps - 1, rate.warmup_steps, last))) == rate.peak
    found = {
        "lr": rate.peak,
        "last lr": rate(last),
        "warm-up epochs": config.optim.warmup_epochs,
        "betas": config.optim.betas,
        "decay": (decay(0), decay(last)),
        "clip": config.optim.clip_grad,
        "epochs": config.train.epochs,
        "batch": config.train.batch_size,
    }
    optional = {
        "first lr": rate(0) if rate.warmup_steps else 0.0,
        "steps": (config.optim.step_factor, *config.optim.step_epochs) if config.optim.step_epochs else None,
        "layer decay": config.optim.layer_decay if config.optim.layer_decay != 1 else None,
        "patch embedding": config.optim.patch_embed_lr_scale if config.optim.patch_embed_lr_scale != 1 else None,
    }
    return {
        key: value for key, value in (found | optional).items() if value or key in ("clip", "warm-up epochs", "last lr")
    }


def of_views(config: Config) -> dict[str, Any]:
    views = config.views
    found: dict[str, Any] = {"crops": [crop(view) for view in views.global_crops]}
    if views.local_crops:
        found["crops"].append(crop(views.local_crops))
    if views.target_crop:
        found["target crop"] = f"{views.target_crop.size[0]} {views.target_crop.interpolation}"
    return found


def of_mask(config: Config) -> dict[str, Any]:
    mask = config.method.mask
    grid = mask_grid(mask, config.views.global_size)
    text = f"{mask.kind}, {num_hidden(mask, grid)} of {grid[0]}x{grid[1]} units of {mask.unit} px"
    if mask.secondary:
        text += f", secondary {mask.secondary}"
    if mask.kind == "blockwise":
        text += f", blocks from {mask.min_block}, aspect from {mask.min_aspect}"
    return {"mask": text}


def of_method(config: Config) -> dict[str, Any]:
    method, updates = config.method, config.train.steps or 0
    match method.name:
        case "mae":
            decoder = f"{method.decoder_dim} wide, {method.decoder_depth} deep, {method.decoder_heads} heads"
            pixels = ", normalised pixels" if method.norm_pix_loss else ""
            return of_mask(config) | {"decoder": decoder + pixels}
        case "mim":
            head = method.aggregation
            found = of_mask(config) | {"target": method.target}
            return found | ({"aggregation": f"{head.depth} blocks on layer {head.layer}"} if head else {})
        case "finetune":
            drawn = method.rand_augment
            assert (method.mix_prob, method.mix_switch_prob) == (1.0, 0.5)
            return {
                "head": f"{'norm after the ' if method.fc_norm else ''}{method.pool}, of {short(method.head_init_std)}",
                "mixed": f"mixup {method.mixup}, cutmix {method.cutmix}, smoothed {method.label_smoothing}, "
                f"{method.mix_mode}",
                "augmented": f"{drawn.ops} of {drawn.magnitude} +- {drawn.magnitude_std} with {drawn.prob}, "
                f"more with more {drawn.increasing}, erased {method.erasing}",
                "measured at": method.val_resize or round(config.views.global_size[0] * 256 / 224),
            }
        case "ijepa":
            scale, aspect, seen = (
                f"{low}-{high}" for low, high in (method.target_scale, method.target_aspect, method.context_scale)
            )
            return {
                "blocks": f"{method.targets} of {scale}, {aspect}, in {seen}, {method.sampling}",
                "predictor": f"{method.predictor_dim} wide, {method.predictor_depth} deep, "
                f"{method.predictor_heads} heads",
                "teacher momentum": method.teacher_momentum,
            }
        case "vqkd":
            decoder = f"{method.decoder_dim} wide, {method.decoder_depth} deep, {method.decoder_heads} heads"
            codes = (
                f"{method.vocab_size} of {method.code_dim}, average {method.momentum}, "
                f"commitment {method.commitment}, restarted below {method.restart_below}"
            )
            return {"codes": codes, "decoder": decoder}
        case "dvae":
            return {
                "codes": f"{method.vocab_size}, {method.hidden} wide, "
                f"{method.groups} groups of {method.blocks_per_group}",
                "temperature": f"{method.temperature} to {method.temperature_end} "
                f"in {round(method.temperature_share * updates)}",
                "divergence": f"{method.kl_weight} in {round(method.kl_share * updates)}",
                "average": method.average_momentum,
            }
    found = {
        "head": f"{method.prototypes} prototypes, {method.head_hidden_dim}, {method.head_bottleneck_dim}, "
        f"norm fixed {method.norm_last_layer}, frozen for {method.freeze_last_layer_epochs:g}",
        "student temperature": method.student_temperature,
        "teacher temperature": f"{method.warmup_teacher_temperature} to {method.teacher_temperature} "
        f"in {method.warmup_teacher_temperature_epochs} epochs",
        "teacher momentum": method.teacher_momentum,
        "centre": f"{method.centering} {method.center_momentum}",
    }
    if method.koleo_weight:
        found["koleo"] = method.koleo_weight
    if ibot := method.ibot:
        found["ibot"] = (
            f"{ibot.weight}, on {ibot.masked_share} of the crops, {ibot.ratio[0]} to {ibot.ratio[1]} hidden, "
            f"blocks from {ibot.min_block}, separate head {ibot.separate_head}"
        )
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_preset_has_the_published_numbers(name: str) -> None:
    config = load_config(name, ["data.train=x"])
    found = of_optim(config) | of_views(config) | of_method(config)
    if config.encoder:
        found["encoder"] = encoder(config)
    expected = PUBLISHED[name]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, (float, int, tuple)):
            # the last step is one before the end of the schedule
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-9), key
        else:
            assert found[key] == value, key


@pytest.mark.parametrize("name", [preset.name for preset in list_presets() if preset.name.startswith("finetune_")])
def test_a_preset_tunes_what_its_command_names(name: str) -> None:
    head = next(preset.path for preset in list_presets() if preset.name == name).read_text().splitlines()[0]
    source = re.search(r"finetune runs/(\w+)", head)
    if source is None or source[1] == "photos":
        return
    theirs, ours = (settings_of(load_config(preset, ["data.train=x"]).encoder) for preset in (source[1], name))
    theirs.pop("positions", None)  # fixed ones may be learned on
    assert theirs.items() <= ours.items()


def test_all_published_presets_are_pinned() -> None:
    assert set(PUBLISHED) == {preset.name for preset in list_presets() if "_in1k" in preset.name}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_preset_cites_its_sources(name: str) -> None:
    """A repository's file, or a paper's table or section; or another preset that does."""
    head = next(preset.path for preset in list_presets() if preset.name == name).read_text().split("description:")[0]
    sources = head.split("# Sources:")[1].replace("\n# ", " ")
    base = re.search(r"those of (\w+)", sources)
    if base:
        assert base[1] in PUBLISHED
    else:
        repository_file = re.search(r"[\w-]+/[\w-]+.* [\w/]+\.(md|py|yaml)", sources)
        assert repository_file or re.search(r"et al\. 20\d\d, (table|appendix|section) ", sources)
