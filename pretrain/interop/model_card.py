"""The model card of an exported encoder: recipe, data and probes, and nothing of the machine it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import timm
import yaml
from pydantic import TypeAdapter

from data_pipelines.files import read_json
from pretrain.config import EncoderConfig
from pretrain.description import describe, own_words
from pretrain.encoders.saved import EncoderCard

HIDDEN_SECTIONS = ("runs", "tracking", "checkpoint")  # of the configuration: they change nothing that is learned
FREE_TEXT = ("name", "description")


def model_card(
    card: EncoderCard,
    recipe: dict[str, Any] | None,
    *,
    run: Path | None = None,
    probes: Sequence[str] = (),
    source: Path | None = None,
) -> str:
    """README.md of a Hugging Face Hub folder, with the head that the Hub reads.

    Args:
        recipe: timm's, as in `timm_recipe`; None: of an encoder of images at their own shape, which selfsight opens.
        run: The run folder; its configuration and what its checkpoints say of the data go into the card.
        probes: Markdown, one piece a probe.
        source: The encoder folder; where it was imported, the card names the checkpoint and its layout.
    """
    by_timm = [] if recipe is None else ["timm"]
    head = {
        "library_name": "selfsight" if recipe is None else "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["image-feature-extraction", *by_timm, "self-supervised", "selfsight", card.method],
        "license": "unknown",
    }
    config, imported = _config_of(run), _import_of(source)
    allow = "the training images allow it"
    if imported is not None:
        allow = "the training images and the licence of the imported checkpoint allow it"
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {card.run}",
        _summary(card, config, imported),
        "## How to load\n\n" + (_loading(card) if recipe is not None else _loading_native(card)),
        "## Recipe\n\n" + _recipe(card, recipe, config),
        "## Data\n\n" + _data(card, run, config),
        "## Probes\n\n" + _probes(card, probes),
        "## Licence\n\nNot chosen yet. Whoever publishes this folder names the licence here and in the head of this "
        f"file, and makes sure that {allow}.",
    ]
    return "\n\n".join(sections) + "\n"


def _import_of(source: Path | None) -> dict[str, Any] | None:
    """What `selfsight import` wrote of where an encoder came from."""
    return None if source is None or not source.is_dir() else read_json(source / "import.json")


def _summary(card: EncoderCard, config: dict[str, Any] | None, imported: dict[str, Any] | None) -> str:
    if imported is not None:
        origin = f"imported from `{PurePath(imported['file']).name}`, a checkpoint in the layout of {imported['as']}"
    elif config is not None:
        source = config.get("init_from")
        how = "from random weights, without labels," if source is None else f"from the weights of `{_last(source)}`,"
        origin = f"pretrained with {card.method} {how} by selfsight"
    else:
        origin = f"({card.method}), exported by selfsight without the run that it came from"
    text = (
        f"An image encoder {origin}. It has no classifier: it gives features of images of "
        f"{card.image_size[0]}x{card.image_size[1]} px with {card.channels} channels."
    )
    if config is None:
        return text
    said = own_words(config)
    return f"{text}\n\n> {describe(config)}." + (f"\n>\n> {said}" if said else "")


def _last(source: str) -> str:
    """A source without the folders of the machine it lies on."""
    return source if source.startswith("timm:") else PurePath(source).name


def _loading(card: EncoderCard) -> str:
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (card.mean, card.std))
    prepare = """transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
features = model(transform(image).unsqueeze(0))"""
    if card.bits != 8 or card.channels not in (1, 3):  # timm's transforms know no such images
        prepare = f"""mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
images = torch.from_numpy(pixels).float() / {2**card.bits - 1}  # pixels: (b, {card.channels}, h, w) uint{card.bits}
features = model((images - mean) / std)"""
    return f"""```python
import timm{chr(10) + "import torch" if "torch." in prepare else ""}

model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"
{prepare}
```

Pixels of {card.bits} bits are divided by {2**card.bits - 1}, minus mean ({mean}), divided by std ({std}), as in
training. The probes resize the short side to 256 / 224 of the crop by bicubic interpolation and crop the centre; images
of exactly the crop's size are taken whole. Their headline feature is {_headline(card)}."""


def _loading_native(card: EncoderCard) -> str:
    return f"""```python
from pathlib import Path

from pretrain.encoders.saved import load_encoder  # of selfsight

encoder, card = load_encoder(Path("FOLDER"))  # where this folder lies
```

or `selfsight embed FOLDER --data photos/ --out features/ --native`.

Images are seen whole and at their own shape, cut into patches of {card.encoder.patch} px. Pixels of {card.bits} bits
are divided by {2**card.bits - 1}, minus mean ({", ".join(f"{value:g}" for value in card.mean)}), divided by std
({", ".join(f"{value:g}" for value in card.std)}). The headline feature of the probes is {_headline(card)}."""


def _headline(card: EncoderCard) -> str:
    names = {"class": "the class token", "mean": "the mean of the patch tokens", None: "the model's own pooled feature"}
    return names[card.headline]


def _recipe(card: EncoderCard, recipe: dict[str, Any] | None, config: dict[str, Any] | None) -> str:
    encoder = TypeAdapter(EncoderConfig).dump_python(card.encoder, mode="json")
    family = encoder.pop("family")
    options = ", ".join(f"{key} {value}" for key, value in encoder.items() if value is not None)
    rows = {"method": card.method, "encoder": f"{family}: {options}"}
    if card.step:
        rows["trained for"] = f"{card.step:,} steps, {card.epoch:.4g} epochs"
    if recipe is not None:
        rows["timm"] = f"`{recipe['model_name']}` with the arguments of `config.json`, checked with {timm.__version__}"
    table = _table(rows)
    if config is None:
        return table + "\n\nThe configuration of the run was not at hand when this was written."
    text = yaml.safe_dump(config, sort_keys=False, width=110)
    return f"{table}\n\n<details><summary>The whole configuration</summary>\n\n```yaml\n{text}```\n\n</details>"


def _data(card: EncoderCard, run: Path | None, config: dict[str, Any] | None) -> str:
    state = None if run is None else _state_of(run, card.step)
    rows = {}
    data = (config or {}).get("data")
    if isinstance(data, dict) and data.get("train"):
        rows["name"] = _names(data["train"])
    if state is not None:
        segments = state["segments"]
        for number, segment in enumerate(segments):
            since = f", from step {segment['start_step']:,}" if number else ""
            images = sum(part["num_samples"] for part in segment["parts"])
            rows[f"images{since}"] = f"{images:,}"
            rows[f"checksum{since}"] = " ".join(f"`{part['checksum']}`" for part in segment["parts"])
    if not rows:
        return "Which images the encoder was trained on is not recorded beside it."
    return _table(rows) + "\n\nPretraining used no labels."


def _names(train: Any) -> str:
    if not isinstance(train, list):
        return str(train)
    named = [(source.get("name") or source.get("path"), source.get("weight")) for source in train]
    return ", ".join(str(name) if weight is None else f"{name} (weight {weight:g})" for name, weight in named)


def _probes(card: EncoderCard, probes: Sequence[str]) -> str:
    if not probes:
        which = f"encoder of step {card.step:,}" if card.step else "encoder"
        return f"The {which} has not been probed, so nothing is known here of how good it is."
    note = (
        "Frozen features, under one protocol, beside what needs no pretraining: the same encoder untrained, raw pixels "
        "and chance."
    )
    return "\n\n".join([note, *(piece.strip() for piece in probes)])


def _config_of(run: Path | None) -> dict[str, Any] | None:
    """The run's resolved configuration as it may be shown: of paths only the last name."""
    if run is None or not (run / "config.yaml").is_file():
        return None
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return None
    if not isinstance(config, dict):
        return None
    return {
        key: value if key in FREE_TEXT else _without_paths(value)
        for key, value in config.items()
        if key not in HIDDEN_SECTIONS
    }


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    if isinstance(value, str) and not value.startswith("timm:"):
        path = PurePath(value)
        shards = path.suffix == ".tar" and path.parent.name  # shards/train-{000..009}.tar is called shards
        return (path.parent.name if shards else path.name) if len(path.parts) > 1 else value
    return value


def _state_of(run: Path, step: int) -> dict[str, Any] | None:
    """What a checkpoint says of the order of data: that of `step`, else any, for a run keeps to its data."""
    own = run / "checkpoints" / f"step-{step:08d}" / "state.json"
    for path in (own, *sorted((run / "checkpoints").glob("step-*/state.json"), reverse=True)):
        try:
            order = (read_json(path) or {}).get("state", {}).get("order", {})
        except (ValueError, AttributeError):
            continue
        if {"batch_size", "segments"} <= set(order):
            return order
    return None


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
