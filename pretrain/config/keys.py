"""Keys that there are not: settings by their old names, those of another method, and the nearest there is."""

from __future__ import annotations

import difflib
from typing import Any

from pretrain.config.annotations import (
    Setting,
    all_settings,
    element_of,
    hints_of,
    section_of,
    sections_of,
    settings_at,
    tag_of,
)
from pretrain.config.errors import ConfigError

#: Settings that have another name now, without positions in lists.
RENAMED = {
    "train.accumulation": "train.grad_accum_steps",
    "data.repeats": "data.repeated_augmentation",
    "data.cache.ahead": "data.cache.prefetch_steps",
    "data.executor": "data.backend",
    "method.vocabulary": "method.vocab_size",
    "method.codes": "method.vocab_size",
    "method.divergence_weight": "method.kl_weight",
    "method.divergence_share": "method.kl_share",
    "method.head_hidden": "method.head_hidden_dim",
    "method.head_bottleneck": "method.head_bottleneck_dim",
    "views.global_crops.grey": "views.global_crops.grayscale",
    "views.local_crops.grey": "views.local_crops.grayscale",
}
#: What a setting is called elsewhere.
SYNONYMS = {
    "learning_rate": "optim.lr",
    "base_lr": "optim.lr",
    "blr": "optim.lr",
    "min_lr": "optim.lr_end",
    "wd": "optim.weight_decay",
    "grad_clip": "optim.clip_grad",
    "max_grad_norm": "optim.clip_grad",
    "bs": "train.batch_size",
    "max_steps": "train.steps",
    "max_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "iterations": "train.steps",
    "image_size": "views.global_crops.size",
    "img_size": "views.global_crops.size",
    "input_size": "views.global_crops.size",
    "crop_size": "views.global_crops.size",
    "local_crops_number": "views.local_crops.count",
    "workers": "data.workers",
    "num_workers": "data.workers",
    "data_path": "data.train",
    "dataset": "data.train",
    "model": "encoder.family",
    "arch": "encoder.family",
    "backbone": "encoder.family",
    "patch_size": "encoder.patch",
    "embed_dim": "encoder.dim",
    "num_heads": "encoder.heads",
    "mask_ratio": "method.mask.ratio",
    "out_dim": "method.prototypes",
    "momentum_teacher": "method.teacher_momentum",
    "output_dir": "runs",
    "run_name": "name",
    "resume": "name",
    "checkpoint": "init_from",
    "pretrained": "init_from",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "amp": "engine.precision",
    "save_every": "checkpoint.every_steps",
    "wandb_project": "tracking.project",
}
_CUTOFF = 0.7
_MOST = 4  # settings named at a time


def check_keys(root: type, data: Any) -> None:
    """Refuse unknown keys: with their new name, with the method they belong to, or with the nearest there is."""
    _check(root, root, data, "")


def _check(root: type, annotation: Any, data: Any, path: str) -> None:
    section = section_of(annotation, data)
    if section is None:
        if isinstance(data, (list, tuple)):
            for position, item in enumerate(data):
                _check(root, element_of(annotation), item, f"{path}{position}.")
        return
    for key, value in data.items():
        if key not in hints_of(section):
            raise ConfigError(_unknown(root, annotation, section, f"{path}{key}"))
        _check(root, hints_of(section)[key], value, f"{path}{key}.")


def _unknown(root: type, annotation: Any, section: type, full: str) -> str:
    """Why there is no such key, and which there is."""
    plain = _plain(full)
    if plain in RENAMED:
        return f"{full} is called {RENAMED[plain]} now: write that instead"
    path, _, key = full.rpartition(".")
    tag = tag_of(section)
    if tag is not None:
        having = [tag_of(other) for other in sections_of(annotation) if key in hints_of(other)]
        kinds = " and ".join(other[1] for other in having if other)
        if kinds:
            return (
                f"unknown key {full}: it belongs to {path} {kinds}, and the {path} here is {tag[1]}; "
                f"`selfsight settings {path} --of {tag[1]}` shows what that has"
            )
    near = nearest(root, full, [f"{path}.{name}".lstrip(".") for name in hints_of(section)])
    if near:
        return f"unknown key {full}; did you mean {' or '.join(near)}?"
    return f"unknown key {full}; allowed here: {', '.join(sorted(hints_of(section)))}"


def _plain(key: str) -> str:
    """A key without positions in lists."""
    return ".".join(part for part in key.split(".") if not part.isdigit())


def nearest(root: type, full: str, here: list[str] | None = None) -> list[str]:
    """The settings that `full` may be meant for, with the method or family that has them where only some do.

    First those of the same name in other sections, then what is called so elsewhere, then what is spelt alike: in the
    same section (`here`), and in all.
    """
    key = full.rpartition(".")[2].lower().replace("-", "_")
    by_name: dict[str, dict[str, list[str]]] = {}
    for setting in all_settings(root):
        kinds = by_name.setdefault(setting.name, {}).setdefault(setting.path, [])
        kinds += [setting.kind] if setting.kind else []
    if key in by_name:
        return [_told(root, path, kinds) for path, kinds in by_name[key].items()][:_MOST]
    if key in SYNONYMS:
        path = SYNONYMS[key]
        return [_told(root, path, by_name[path.rpartition(".")[2]][path])]
    alike = difflib.get_close_matches(key, [path.rpartition(".")[2] for path in here or ()], n=1, cutoff=_CUTOFF)
    if alike:
        return [path for path in here or () if path.rpartition(".")[2] == alike[0]]
    alike = difflib.get_close_matches(key, list(by_name), n=1, cutoff=_CUTOFF)
    if alike:
        return [_told(root, path, kinds) for path, kinds in by_name[alike[0]].items()][:_MOST]
    paths = {path: kinds for found in by_name.values() for path, kinds in found.items()}
    return [_told(root, path, paths[path]) for path in difflib.get_close_matches(full, paths, n=1, cutoff=_CUTOFF)]


def _told(root: type, path: str, kinds: list[str]) -> str:
    """`method.prototypes (of method dino)`."""
    if not kinds:
        return path
    section = path.partition(".")[0]
    every = {tag[1] for member in sections_of(hints_of(root)[section]) if (tag := tag_of(member))}
    return path if set(kinds) == every else f"{path} (of {section} {', '.join(dict.fromkeys(kinds))})"


def known(root: type, key: str) -> list[Setting]:
    """What `key` names; raises ConfigError with the nearest settings where that is nothing."""
    found = settings_at(root, key)
    if found:
        return found
    plain = _plain(key)
    if plain in RENAMED:
        raise ConfigError(f"{key} is called {RENAMED[plain]} now")
    near = nearest(root, key)
    raise ConfigError(f"there is no setting {key}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
