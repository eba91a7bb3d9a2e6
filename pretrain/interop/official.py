"""`selfsight import`: official checkpoints under our names, every key accounted for.

A key that its layout does not know, or one that the encoder needs and the file has not, is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Literal

from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file

from data_pipelines.files import staged, write_json
from pretrain.encoders.layouts import CheckpointState, Imported, State
from pretrain.encoders.read_layout import layouts, read_layout, recognised_layout
from pretrain.encoders.registry import build_encoder, family_of
from pretrain.encoders.saved import EncoderCard, save_encoder
from pretrain.encoders.transfer import fit
from pretrain.interop.checkpoint_file import is_export, read_tensors, read_told, weights_in
from pretrain.interop.initialise import HEADS_FILE
from pretrain.methods.registry import METHODS


def import_checkpoint(
    file: Path,
    layout: str | None,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    which: str = "teacher",
    heads: bool | None = None,
) -> Imported:
    """Read `file` in a family's `layout` and write an encoder folder `out`, which probes, exports and starts runs.

    Args:
        file: A .pth, .pt or .bin of tensors, .safetensors, or a folder with the files of a model of the Hub, whose
            config.json is asked for what weights do not tell.
        layout: One of `encoders.read_layout.layouts()`; None: the one that its keys are certainly of.
        overrides: `key=value` of the encoder's configuration that the weights do not tell, such as heads=6, and
            grid=HxW, the rows and columns of its positions where they are no square.
        image_size: Side in px to fit positions to; default: what they were made for.
        mean, std: Of the pixels it was trained on; default: the layout's.
        which: teacher or student, where the checkpoint holds both.
        heads: Whether the decoder or heads of its method are taken along; None: where it has some.

    Writes `model.safetensors` and `config.json`, `heads.safetensors` with the decoder or heads, and `import.json` with
    what became of every key. Raises ValueError for a key it can't account for, FileExistsError where `out` exists.
    `out` is there whole or not at all.
    """
    if which not in ("teacher", "student"):
        raise ValueError(f"which is {which!r}; a checkpoint holds a teacher and a student")
    if layout is not None and layout not in layouts():
        raise ValueError(f"there is no layout {layout!r}; --as takes one of {', '.join(layouts())}")
    if out.exists():
        raise FileExistsError(f"{out} exists; name a new folder, or remove it")
    file = weights_in(file) if file.is_dir() else file
    if layout is None and is_export(file):
        raise ValueError(f"{file} is an encoder as `selfsight export` wrote it: probe it, or set init_from={file}")
    told = read_told(file)
    try:
        state = CheckpointState(read_tensors(file), which, overrides, image_size, told)
        layout = layout or recognised_layout(state)
        imported = read_layout(layout, state)
    except ValidationError as error:  # what its weights tell is no such encoder
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"{file} is not in layout {layout} (--as): {reason}") from None
    imported.normalisation = told.get("normalisation", imported.normalisation)
    if heads is False:
        imported.left |= dict.fromkeys(imported.method, "of its method, left out with --with none")
        imported.method = {}
    if heads and not imported.method:
        raise ValueError(f"{file} holds no head or decoder of its method (--with heads); leave --with out")
    if imported.mask_token is not None:
        imported.method["encoder.mask_token"] = imported.mask_token
    _check_numbers({**imported.weights, **imported.method}, state.file_tensors, file)
    size = imported.image_size if image_size is None else (image_size, image_size)
    stride = imported.encoder.stride
    if any(side % stride for side in size):
        below = max(size[0] // stride, 1) * stride
        raise ValueError(
            f"--image-size is {size[0]}; the encoder's stride is {stride} px, so it must be a multiple of that, such "
            f"as {below} or {below + stride}"
        )
    channels = resolve_name(family_of(imported.encoder).build).channels_of(imported.weights)
    imported.normalisation = _normalisation(imported, channels, mean, std)
    encoder = build_encoder(imported.encoder, size, channels, mask_token=imported.mask_token is not None)
    names = encoder.inner().state_dict()
    missing = sorted(set(names) - set(imported.weights))
    unknown = sorted(set(imported.weights) - set(names))
    if missing or unknown:
        raise ValueError(
            f"{file} is not the checkpoint of a {imported.encoder.family} in layout {layout}: "
            + "; ".join(
                f"{what} {', '.join(keys[:6])}{f' and {len(keys) - 6} more' if len(keys) > 6 else ''}"
                for what, keys in (("it lacks", missing), ("it has the unknown", unknown))
                if keys
            )
        )
    rows, columns = (side // imported.encoder.patch for side in imported.image_size)
    fitted = fit(imported.weights, encoder, old_grid=(rows, columns))
    if fitted.left or fitted.fresh:
        problems = [f"{key}: {why}" for key, why in {**fitted.left, **fitted.fresh}.items()]
        raise ValueError(f"{file} does not fit {imported.encoder}: {'; '.join(problems[:5])}")
    encoder.inner().load_state_dict(fitted.weights)
    imported.resized = fitted.resized
    card = EncoderCard(
        encoder=imported.encoder,
        image_size=size,
        channels=channels,
        frames=getattr(imported.encoder, "frames", 1),
        mean=imported.normalisation[0],
        std=imported.normalisation[1],
        method=imported.method_name,
        headline=_headline(imported, encoder.has_class_token),
        step=0,
        epoch=0.0,
        run=out.name,
    )
    with staged(out) as folder:
        save_encoder(folder, encoder.state_dict(), card)
        if imported.method:
            method = {key: value.contiguous() for key, value in imported.method.items()}
            save_file(method, folder / HEADS_FILE)
        write_json(
            folder / "import.json",
            {
                "file": str(file), "as": layout, "resized": fitted.resized, "left": imported.left,
                "encoder_keys": len(imported.weights), "method_keys": sorted(imported.method), "notes": imported.notes,
            },
        )  # fmt: skip
    return imported


def _check_numbers(weights: State, in_file: State, file: Path) -> None:
    """Raise ValueError, by the keys of the file, for weights that are no floating-point numbers, or not finite."""
    for key, value in weights.items():
        if not value.is_floating_point() and not key.endswith("num_batches_tracked"):  # a batch norm's count
            raise ValueError(
                f"{key} holds {value.dtype}, which is no floating-point number: quantised weights, perhaps"
            )
    if not all(value.isfinite().all() for value in weights.values()):
        broken = {key: int((~value.isfinite()).sum()) for key, value in in_file.items() if not value.isfinite().all()}
        listed = ", ".join(f"{key} ({count} of {in_file[key].numel()})" for key, count in list(broken.items())[:6])
        more = f" and {len(broken) - 6} more" if len(broken) > 6 else ""
        raise ValueError(
            f"{file} holds weights that are NaN, infinite, or too large for float32: {listed}{more}. No encoder "
            "computes with them: import a checkpoint from before its training diverged"
        )


def _normalisation(
    imported: Imported, channels: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std as given, else the layout's."""
    if (mean is None) != (std is None):
        raise ValueError("--mean and --std go together: give both or neither")
    if mean is None or std is None:
        if channels != 3:
            raise ValueError(
                f"the checkpoint takes {channels} channels; give the mean and deviation it was trained with (--mean, "
                "--std), of pixels in 0 .. 1"
            )
        return imported.normalisation
    for option, values in (("--mean", mean), ("--std", std)):
        if len(values) != channels:
            raise ValueError(f"{option} has {len(values)} values and the checkpoint takes {channels} channels")
    if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
        raise ValueError(
            f"--mean {mean} and --std {std} are to be of pixels in 0 .. 1; divide those of 0 .. 255 by 255"
        )
    return mean, std


def describe(imported: Imported, out: Path) -> str:
    """What was imported and what was left, for people."""
    config = imported.encoder
    plain = TypeAdapter(type(config)).dump_python(type(config)())
    told = {key: value for key, value in TypeAdapter(type(config)).dump_python(config).items() if value != plain[key]}
    values = {key: str(list(value) if isinstance(value, tuple) else value) for key, value in told.items()}
    settings = " ".join(f"encoder.{key}={value.replace(' ', '')}" for key, value in values.items())
    mean, std = imported.normalisation
    lines = [
        f"{out}: as settings of a run: encoder.family={config.family} {settings}",
        f"{len(imported.weights)} tensors of the encoder",
        f"pixels in 0 .. 1, minus mean {mean}, by std {std}; others: --mean, --std",
    ]
    lines += imported.notes
    lines += [f"resized: {key} ({shapes})" for key, shapes in imported.resized.items()]
    if imported.method:
        lines.append(f"{len(imported.method)} of its method (in {HEADS_FILE}): {', '.join(imported.method)}")
    reasons: dict[str, list[str]] = {}
    for key, why in imported.left.items():
        reasons.setdefault(why, []).append(key)
    for why, keys in reasons.items():
        more = f" and {len(keys) - 4} more (in import.json)" if len(keys) > 4 else ""
        lines.append(f"left out, {why}: {', '.join(keys[:4])}{more}")
    return "\n".join(lines)


def _headline(imported: Imported, has_class_token: bool) -> Literal["class", "mean"] | None:
    """The feature that its training trained: the class token, the mean of the patch tokens, or (None) a pooled one of
    its family's own."""
    if not _trains_class_token(imported.method_name):
        return "mean"
    return "class" if has_class_token else family_of(imported.encoder).headline(imported.encoder)


def _trains_class_token(method: str) -> bool:
    """Of a method of ours, and of others' models, which are classifiers."""
    return method not in METHODS or METHODS[method].headline == "class"
