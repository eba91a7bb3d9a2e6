from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.config.load import ConfigError, differences, dump_config, list_presets, load_config, parse_config
from pretrain.encoders.timm.config import TimmConfig


def test_what_is_wrong_with_the_data_is_told_once() -> None:
    """They are one path, or a list of data sets."""
    for given, told in (
        ("null", "data.train: no training shards are named; add --data PATH (short for data.train=PATH)"),
        (
            "[{path: a, weight: -1}]",
            "data.train.0.weight: this takes a number, above 0, or null (given: -1); "
            "`selfsight settings data.train.weight` says what it means",
        ),
        ("[{path: a}, b]", "data.train.1: Input should be a dictionary or an instance of SourceConfig (given: 'b')"),
        ("[{weight: 1}]", "data.train.0.path: Field required; set it with data.train.0.path=..."),
        ("[]", "data: train names no data; give a folder of shards, or a list of several"),
    ):
        with pytest.raises(ConfigError) as raised:
            load_config("demo", [f"data.train={given}"])
        assert str(raised.value) == told


def set_key(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    *parents, last = key.split(".")
    node = data
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[last] = value
    return data


def test_every_preset_loads_and_reloads_equal(tmp_path: Path) -> None:
    assert list_presets()
    for preset in list_presets():
        config = load_config(preset.name, ["data.train=somewhere"])
        assert preset.description, preset.name
        path = tmp_path / "config.yaml"
        path.write_text(dump_config(config))
        assert load_config(path) == config


def test_every_preset_says_how_to_run_it() -> None:
    for preset in list_presets():
        head = preset.path.read_text().split("description:")[0]
        verb = "finetune" if load_config(preset.path, ["data.train=x"]).method.name == "finetune" else "pretrain"
        own = preset.name if verb == "pretrain" else ""
        for word in (f"# selfsight {verb} {own}", "Hardware:", "Time:", "Result:"):
            assert word in head, f"{preset.path.name} lacks {word!r} in its head comment"


@pytest.mark.parametrize(
    ("preset", "given", "length"),
    [
        ("mae_vit_cifar_cpu", ["train.steps=200"], (None, 200)),
        ("dinov2_vitl16_in1k", ["train.epochs=30"], (30, None)),
        ("mae_vit_cifar_cpu", ["train.steps=null"], (12, None)),
        ("mae_vit_cifar_cpu", ["train.epochs=null", "train.steps=200"], (None, 200)),
    ],
)
def test_a_length_in_steps_takes_the_place_of_one_in_epochs(
    preset: str, given: list[str], length: tuple[float | None, int | None]
) -> None:
    train = load_config(preset, ["data.train=x", *given]).train
    assert (train.epochs, train.steps) == length


def test_so_does_one_in_a_file_that_extends_another(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("extends: mae_vit_cifar_cpu\ndata: {train: x}\ntrain: {steps: 200}\n")
    train = load_config(path).train
    assert (train.epochs, train.steps, train.batch_size) == (None, 200, 128)
    path.write_text(path.read_text().replace("200", "200, epochs: 3"))
    with pytest.raises(ConfigError, match="set one of them"):
        load_config(path)


def test_a_value_of_two_types_is_refused_once() -> None:
    for preset, given, told in (
        ("demo", "train.steps=many", "train.steps: this takes a whole number, above 0"),
        ("dino_own_data", "method.teacher_momentum=high", ", or auto (given: 'high')"),
    ):
        with pytest.raises(ConfigError) as raised:
            load_config(preset, ["data.train=x", given])
        assert told in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1


def test_overrides_reach_into_sections_and_lists() -> None:
    config = load_config(
        "mae_vit_cifar_cpu", ["data.train=x", "train.epochs=3", "views.global_crops.0.flip=0", "optim.lr=1e-4"]
    )
    assert (config.train.epochs, config.views.global_crops[0].flip, config.optim.lr) == (3, 0, 1e-4)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("method.mask.ratoi", 0.5, "did you mean method.mask.ratio?"),
        ("batch_size", 3, "did you mean train.batch_size?"),
        ("views.global_crops.0.sise", 3, "did you mean views.global_crops.0.size?"),
        ("optim.learning_rate", 1.0, "did you mean optim.lr?"),
        ("train.epochs", "many", "given: 'many'"),
        (
            "method.mask.ratio",
            1.5,
            "this takes a number, above 0, below 1 (given: 1.5); `selfsight settings method.mask.r",
        ),
        ("encoder.drop_path", 1.5, "this takes a number, at least 0, below 1 (given: 1.5)"),
        ("data.workers", "abc", "data.workers: this takes a whole number, at least 0, or auto (given: 'abc'); `selfs"),
        ("data.workers", -1, "data.workers: this takes a whole number, at least 0, or auto (given: -1); `selfs"),
        ("engine.compile", "banana", "this takes true or false (given: 'banana')"),
        ("engine.precision", "fp8", "engine.precision: Input should be 'fp32' or 'bf16' (given: 'fp8')"),
        ("engine.precision", "fp16", "engine.precision: fp16 is refused: DeepSpeed leaves autocast's loss scale"),
        ("method.name", "maee", "'clip', 'dino', 'distill', 'dvae', 'finetune', 'ijepa', 'lejepa', 'mae'"),
        ("encoder.patch", 5, "multiple of it, such as 30 or 35"),
        ("encoder.positions", "sinus", "'learned', 'sincos'"),
        ("train.grad_accum_steps", 3, "does not divide into 3"),
        ("train.epochs", 5, "set one of them"),
        ("engine.deepspeed", {"bf16": {"enabled": True}}, "engine.precision"),
        ("engine.deepspeed", {"zero_optimization": {"stage": 2}}, "engine.zero_stage"),
        ("engine.deepspeed", {"communication_data_type": "bf16"}, "in fp32; leave it out"),
        ("engine.deepspeed", {"timers": {}}, "reports images/s by itself"),
        ("engine.deepspeed", {"elasticity": {"enabled": True}}, "order of data"),
        ("method.mask.unit", 6, "does not divide the image"),
        ("method.mask.unit", 2, "multiple of the encoder's patch"),
        ("method.mask.kind", "blockwise", "kind random"),
        ("data.mean", [0.5, 0.5], "2 values for data.channels = 3"),
        ("name", "../elsewhere", "pattern"),
        ("views.local_crops", {"size": 16}, "sees no local crops"),
        ("optim.schedule", "steps", "they go together"),
        ("optim", {"lr": 1, "schedule": "steps", "step_epochs": [3], "lr_end": 0.1}, "belongs to schedule cosine"),
        ("optim", {"lr": 1, "schedule": "steps", "step_epochs": [3], "warmup_epochs": 4}, "beyond the first of step"),
    ],
)
def test_refusals_name_the_key_and_the_way_out(mae_data: dict[str, Any], key: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(set_key(mae_data, key, value))
    assert says in str(caught.value)


def test_a_run_shorter_than_its_warm_up_is_told_of_both(mae_data: dict[str, Any]) -> None:
    mae_data["train"] = {"epochs": 0.5, "batch_size": 8}
    with pytest.raises(ConfigError, match=r"set it along, such as optim\.warmup_epochs=0\.05"):
        parse_config(set_key(mae_data, "optim.warmup_epochs", 1))


def test_a_pyramid_needs_its_own_masks(mae_data: dict[str, Any]) -> None:
    mae_data["encoder"] = {"family": "swin", "dim": 16, "depths": [2, 2], "heads": [1, 2], "patch": 2, "window": 4}
    with pytest.raises(ConfigError, match="one_in_2x2, not random"):
        parse_config(mae_data)
    mae_data["encoder"]["window"] = 7
    mae_data["encoder"]["depths"], mae_data["encoder"]["heads"] = [2] * 5, [1] * 5
    mae_data["method"]["mask"]["kind"] = "one_in_2x2"
    with pytest.raises(ConfigError, match="multiple of 64"):
        parse_config(mae_data)


def test_steps_that_a_run_never_reaches_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"step_epochs ends with 700, which train.epochs = 100 never reaches"):
        load_config("simmim_vitb16_in1k_800", ["data.train=x", "train.epochs=100"])


def written(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_file_extends_a_preset(tmp_path: Path) -> None:
    """Mappings are merged, values and lists replace the other's, and the name is the extending file's."""
    written(
        tmp_path,
        mine="""
            extends: dino_vits16_in1k_100
            views: {global_crops: [{size: 64}, {size: 64}], local_crops: {size: 32}}
            encoder: {patch: 8}
            optim: {lr: 0.5}
        """,
    )
    ours = load_config(tmp_path / "mine.yaml", ["data.train=x"])
    base = load_config("dino_vits16_in1k_100", ["data.train=x"])
    assert ours.name == "mine"
    assert (ours.encoder.patch, ours.encoder.size, ours.encoder.drop_path) == (8, "small", 0.1)
    assert (ours.optim.lr, ours.optim.weight_decay_end) == (0.5, 0.4)
    assert ours.views.global_crops[0].blur == 0.0, "a list replaces a list"
    assert (ours.views.local_crops.size, ours.views.local_crops.blur) == ((32, 32), 0.5)
    assert ours.method == base.method
    assert "extends" not in dump_config(ours)


def test_a_section_of_another_tag_replaces_the_whole(tmp_path: Path) -> None:
    written(
        tmp_path,
        other="extends: dino_vits16_in1k_100\nencoder: {family: swin, window: 8}",
        same="extends: dino_vits16_in1k_100\nmethod: {name: dino, prototypes: 8}",
    )
    swin = load_config(tmp_path / "other.yaml", ["data.train=x"]).encoder
    assert (swin.family, swin.window, swin.size, swin.drop_path) == ("swin", 8, "tiny", 0.0)
    dino = load_config(tmp_path / "same.yaml", ["data.train=x", "method.freeze_last_layer_epochs=3"]).method
    assert (dino.prototypes, dino.freeze_last_layer_epochs, dino.teacher_temperature) == (8, 3, 0.04)


def test_a_timm_model_by_its_short_name_has_settings(tmp_path: Path) -> None:
    short = ["encoder=timm:resnet18", "encoder.drop_path=0.1", "encoder.args.layers=[1,1,1,1]", "data.train=x"]
    config = load_config("dino_swint_in1k_300", [*short, "views.local_crops=null"])
    assert config.encoder == TimmConfig(model="resnet18", drop_path=0.1, args={"layers": [1, 1, 1, 1]})
    written(
        tmp_path,
        base="extends: dino_swint_in1k_300\nencoder: timm:resnet18",
        top="extends: base.yaml\nencoder: {drop_path: 0.2}",
    )
    config = load_config(tmp_path / "top.yaml", ["data.train=x", "views.local_crops=null"])
    assert config.encoder == TimmConfig(model="resnet18", drop_path=0.2)


def test_extending_goes_on(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    written(
        tmp_path,
        first="extends: mae_vit_cifar_cpu\nname: first\nseed: 1\noptim: {lr: 0.25}",
        second="extends: first.yaml\nseed: 2",
    )
    written(tmp_path / "deep", third="extends: ../second.yaml\ntrain: {batch_size: 64}")
    config = load_config(tmp_path / "deep" / "third.yaml", ["data.train=x"])
    assert (config.name, config.seed, config.optim.lr, config.train.batch_size) == ("third", 2, 0.25, 64)
    assert config.method == load_config("mae_vit_cifar_cpu", ["data.train=x"]).method


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("extends: mae_vit_cifar_gpu", r"a.yaml extends mae_vit_cifar_gpu: .* did you mean mae_vit_cifar_cpu"),
        ("extends: other.yaml", "there is no file .*other.yaml"),
        ("extends: [demo]", r"extends is \['demo'\]; name one preset"),
        ("extends: a.yaml", "a.yaml -> a.yaml"),
        ("extends: b.yaml", "a.yaml -> b.yaml -> c.yaml -> a.yaml"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path: Path, text: str, says: str) -> None:
    written(tmp_path, a=text, b="extends: c.yaml", c="extends: a.yaml")
    with pytest.raises(ConfigError, match=says):
        load_config(tmp_path / "a.yaml")


def test_an_override_of_one_crop_leaves_the_other() -> None:
    """The two are one object in the file, by a YAML alias."""
    crops = load_config("demo", ["data.train=x", "views.global_crops.0.grayscale=0.1"]).views.global_crops
    assert (crops[0].grayscale, crops[1].grayscale) == (0.1, 0.3)


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="'seed' is set twice, again in line 2"):
        load_config(path)


def test_yaml_tags_that_build_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("seed: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]" for i in range(1, 10)), "more than"),
        ("data: &a {train: *a}", "contains itself"),
    ],
)
def test_yaml_aliases_do_not_fill_the_memory(tmp_path: Path, text: str, says: str) -> None:
    written(tmp_path, bomb=text)
    with pytest.raises(ConfigError, match=says):
        load_config(tmp_path / "bomb.yaml")


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean mae_vit_cifar_cpu"):
        load_config("mae_vit_cifar_gpu")


def test_differences_name_full_keys(mae_data: dict[str, Any]) -> None:
    before = parse_config(mae_data)
    mae_data["method"]["mask"]["ratio"] = 0.5
    assert differences(before, parse_config(mae_data)) == ["method.mask.ratio: 0.75 -> 0.5"]
    assert yaml.safe_load(dump_config(before))["method"]["mask"]["ratio"] == 0.75


def test_importing_the_configuration_imports_no_torch() -> None:
    code = "import sys, pretrain.config.load, pretrain.engines.schedules, pretrain.stream.masking; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_secrets_in_urls_are_not_written_down() -> None:
    secret = load_config("demo", ["data.train=https://me:hunter2@host/set?token=hunter3", "data.cache.max_bytes=1.5GB"])
    assert secret.data.train == "https://me:hunter2@host/set?token=hunter3"
    assert secret.data.cache.max_bytes == 1_500_000_000
    assert "hunter" not in dump_config(secret)
    assert "https://***@host/set?***" in dump_config(secret)
    other = load_config("demo", ["data.train=https://me:hunter4@host/set", "data.cache.max_bytes=1.5GB"])
    assert not [line for line in differences(secret, other) if "hunter" in line]
