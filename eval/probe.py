"""`selfsight probe`: what a frozen encoder is worth, beside chance, raw pixels and the same encoder untrained."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data_pipelines.files import write_json
from data_pipelines.remote.urls import redact
from eval import registry
from eval.base import LabelKind, NativeTokens
from eval.baselines import cached
from eval.mask_pictures import write_sheets
from eval.outcomes import write_outcomes
from eval.protocol import Protocol, described
from eval.report import score_of
from eval.result_tables import tables_of
from eval.rows import Rows
from eval.sources import FeatureSource, target_of_store
from eval.splits import open_splits
from eval.store.description import is_store
from eval.store.precision import choose_precision
from eval.stratified import stratified_split
from eval.target import Target, open_target
from eval.words import read_prompts

MAX_PIXEL_SIDE = 32  # raw pixels are compared at most this large: 3,072 values of a colour image


def run_probe(
    target: str,
    data: str,
    *,
    val_data: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    epochs: int = 100,
    seeds: Sequence[int] = (0, 1, 2),
    untrained_seeds: Sequence[int] = (0,),
    also: Sequence[str] = (),
    only: Sequence[str] = (),
    full: bool = False,
    group_by: str | None = None,
    label: str | None = None,
    label_kind: LabelKind | None = None,
    image_size: int | None = None,
    windows: bool = False,
    native: bool = False,
    batch_size: int = 256,
    precision: str = "auto",
    store: str | Path | None = None,
    project: str | None = None,
    group: str | None = None,
    prompts: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Probe `target` on `data` and write everything to a JSON file; returns what it wrote.

    Args:
        target: A run folder, checkpoint or encoder folder, or timm:NAME; see `open_target`. Or a store of features,
            with the encoder that it was made with, where that still is.
        data: A folder of train-*.tar and val-*.tar, labelled; with `val_data`, any data set to learn from.
        val_data: A data set to test on, where it does not lie in `data`.
        out: The file to write; default RUN/eval/probe-STEP-KEY.json, for a timm model probes/NAME-KEY.json, with a KEY
            of data, image size and protocol, so that a probe replaces only its own earlier result.
        device: cpu, cuda, or auto for a GPU where there is one.
        epochs: Of what is trained by steps. seeds: one linear probe each. untrained_seeds: one untrained encoder each.
        image_size: Side of the centre crops in px; default: what the encoder was trained on.
        windows: Crops larger than that are seen through windows of that size, see `eval.sliding`; default: whole.
        native: Images are seen whole and at their own shape, in at most as many patches as a square of that size has;
            of encoders that take them.
        also: Names of further probes, such as logistic; see `eval.registry`. only: of those that run, and no others.
        full: Whole grids where a probe has a coarser one, as logistic (12 of 45 strengths).
        group_by: A field of each sample's `.json`; samples of one value belong together, such as images of one patient.
            No group may be in train and val, nor in both parts of train where a probe chooses. By default that by which
            `data` was packed, if it was by one and train has groups enough.
        label: A field of each sample's `.json` that is to be predicted; default: the sample's class. label_kind: what
            it is: class, several, number or grade; default: what its values look like, see `eval.labels`.
        precision: Of the features, auto, fp32 or bf16; see `eval.store.precision`.
        prompts: A file with words for classes and sentences around them, see `eval.words`.
        store: A folder that `selfsight embed` made of the target and these data: features are read there. Others are
            kept for the next probe, see `eval.sources`.
        project: Of wandb, with `group`: where the probe of a target that is no run of this machine becomes a wandb run
            of its own. The probe of a run goes into the run's.

    Raises ValueError and FileNotFoundError before any work where target or data do not allow a probe.
    """
    start = time.time()
    device = device_named(device)
    named = [registry.load(name) for name in (*only, *also)]
    # masks and label-free measures need no label, where nothing else is asked for
    unlabelled = bool(only) and all(spec.labels in ("mask", "depth", "none") for spec in named) and label is None
    splits = open_splits(data, val_data, group_by, label, label_kind, unlabelled)
    protocol = protocol_of(also, seeds, epochs, full, only, splits.labels.kind, prompts)
    train, val = splits.train, splits.val
    groups = None if splits.groups is None else torch.from_numpy(splits.groups[0][splits.wanted()[0]])
    too_few = ""
    try:  # refuses now what probes would refuse late
        if not unlabelled and protocol.chooses:
            stratified_split(splits.strata(), 0.1, next(iter(seeds), 0), groups)
    except ValueError:
        if group_by is not None or groups is None:
            raise
        too_few = (
            f"train has too few groups by {splits.group_by} to choose a head on some of them: it is chosen on images "
            "of groups that it learns from, too, and looks better there than it is"
        )
        splits = replace(splits, choose_by_groups=False)
        stratified_split(splits.strata(), 0.1, next(iter(seeds), 0))
    group_by = splits.group_by if splits.choose_by_groups else None
    if is_store(target):
        store = store or target
        target, subject = target_of_store(target, image_size, native)
    else:
        subject = open_target(target, image_size, windows, native)
    if subject.native:
        protocol.check_native()
    if protocol.needs("text") and subject.text is None:
        raise ValueError(
            f"a probe of words is asked for (zero_shot, image_text), and {subject.name} did not learn from captions: "
            "probe a run of method clip, or leave it out"
        )
    if windows and store is not None:
        raise ValueError(f"{store} holds features of whole crops; leave it out, or the windows")

    console = Console(stderr=True, quiet=not progress)
    common: dict[str, Any] = {"train": train.checksum, "val": val.checksum, "protocol": protocol.as_json()}
    if group_by is not None:
        common["group_by"] = group_by
    if label is not None:
        common["label"] = label
    if unlabelled:
        common["unlabelled"] = True
    source = FeatureSource(
        subject, choose_precision(precision, device), device, batch_size, protocol.last_blocks,
        protocol.needs("tokens"), progress,
        lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    if store is not None:
        source.read_store(store, {"train": train, splits.held_out: val})
    probe = Rows(subject, splits, protocol, source, console)
    if too_few:
        probe.warn(too_few)
    for problem in registry.problems():
        probe.say(f"warning: {problem}", always=True)
    pixel_size = min(subject.image_size, MAX_PIXEL_SIDE)
    told = {"state": (train.state, val.state), "known": splits.digest}  # a field's values are not in the checksum
    pixel_key = {"pixels": pixel_size, "channels": subject.channels, "bits": subject.bits, **told, **common}
    untrained_key: dict[str, Any] = {
        "untrained": subject.architecture, "size": subject.image_size, "channels": subject.channels,
        "bits": subject.bits,
        "mean": subject.mean, "std": subject.std, "headline": subject.headline, **told, **common,
    }  # fmt: skip
    if subject.native:
        untrained_key["native"] = common["native"] = True
    if subject.frames > 1:
        of_stacks = {"frames": subject.frames, "frame_stride": subject.frame_stride}
        pixel_key, untrained_key = pixel_key | of_stacks, untrained_key | of_stacks
    if source.precision.arithmetic != "fp32":
        untrained_key["arithmetic"] = source.precision.arithmetic
    rows: dict[str, Any] = {
        "chance": splits.chance(),
        "pretrained": probe.encoder("pretrained", subject.encoder),
        "untrained": [
            cached({**untrained_key, "seed": seed}, partial(probe.untrained, seed)) for seed in untrained_seeds
        ],
    }
    if probe.patches is not None:  # those of pixels are as large as the encoder's
        tokens = probe.patches[0]
        grid = f"native, {subject.encoder.patch} px" if isinstance(tokens, NativeTokens) else tokens.grid
        pixel_key |= {"grid": grid, "size": subject.image_size}
    rows["pixels"] = cached(pixel_key, partial(probe.pixels, pixel_size))
    num_train, num_val = (len(samples) for samples in splits.wanted())
    columns, notes = described(rows["pretrained"], protocol)
    notes = [*splits.notes, *notes]
    if (larger := subject.how_larger()) is not None:
        notes.append(larger)
    if group_by is not None:
        notes.append(f"images of one {group_by} are never in train and {splits.held_out}, nor in both parts of train")
    results = {
        "target": {
            "name": subject.name, "method": subject.method, "step": subject.step, "epoch": subject.epoch,
            "architecture": subject.architecture, "image_size": subject.image_size, "channels": subject.channels,
            "bits": subject.bits, "mean": subject.mean, "std": subject.std, "arithmetic": source.arithmetic,
            "window": subject.window, "native": subject.native,
        },
        "data": {
            "train": {"spec": redact(data), "checksum": train.checksum, "num_labelled": num_train},
            "val": {
                "spec": redact(val_data or data),
                "checksum": val.checksum,
                "split": splits.held_out,
                "num_labelled": num_val,
            },
            "num_classes": splits.num_classes,
            "classes": list(splits.labels.classes),
            "group_by": group_by,
            "label": label,
            "label_kind": None if unlabelled else splits.labels.kind,
        },
        "protocol": {**protocol.as_json(), "untrained_seeds": tuple(untrained_seeds), "pixel_size": pixel_size},
        "rows": rows,
        "columns": columns,
        "notes": notes,
        "warnings": probe.warnings,
        "device": device,
        "versions": _versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
        "seconds": round(time.time() - start, 1),
    }  # fmt: skip
    if subject.window is not None:
        common["window"] = subject.window
    path = out or _results_path(subject, {**common, "size": subject.image_size})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_outcomes(path.with_suffix(".npz"), probe.outcomes, probe.ids, probe.groups)
    pictures = write_sheets(probe.painted, val, probe.ids, subject, path)
    write_json(path, results)
    console.print(f"wrote {path}")
    _log(subject, results, pictures, project, group)
    return results


def protocol_of(
    also: Sequence[str],
    seeds: Sequence[int],
    epochs: int,
    full: bool,
    only: Sequence[str] = (),
    kind: LabelKind = "class",
    prompts: Path | None = None,
) -> Protocol:
    """The protocol of `run_probe` with these arguments, on labels of that kind."""
    options: dict[str, Any] = {"epochs": epochs} | ({"full": True} if full else {})
    return Protocol.of(also, seeds, options | ({} if prompts is None else read_prompts(prompts)), only, kind)


def _results_path(subject: Target, key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return subject.results.with_stem(f"{subject.results.stem}-{digest[:8]}")


def device_named(name: str) -> str:
    """cpu, cuda or cuda:N, of a user's word; ValueError for another word, or for a GPU that is not here."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name):
        raise ValueError(f"device is {name}; it must be auto, cpu, cuda or a GPU's number as in cuda:1")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name}, and torch {torch.__version__} finds no GPU here; use cpu or auto")
    return name


def _versions() -> dict[str, str]:
    found = {}
    for name in ("selfsight", "torch", "timm", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "not installed"
    return found


def _log(
    target: Target, results: dict[str, Any], pictures: Sequence[Path], project: str | None, group: str | None
) -> None:
    """The numbers, with tables and pictures, into the wandb run of the training; or, where a `project` is given, the
    numbers into one of their own."""
    from pretrain.tracking import probes

    found = {}
    for column in results["columns"]:
        measured = score_of(results["rows"]["pretrained"], column)
        if measured is None:
            continue
        accuracy = probes.Accuracy(measured[column.get("key", "top1")], measured["standard_error"])
        found[column["name"]] = accuracy
        if column["headline"]:
            found[column["probe"]] = accuracy
    if target.run is not None:
        probes.log_probe(target.run, target.step, found, tables_of(results), pictures)
    elif project is not None:
        about = {"target": results["target"], "data": results["data"], "protocol": results["protocol"]}
        probes.log_lone_probe(target.results.parent, target.name, found, about, project, group)
