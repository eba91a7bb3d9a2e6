"""The `selfsight` commands about encoders: export, import, and what goes with what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXPORT_EXAMPLES = (
    "Examples:\n\n[bold]selfsight export runs/photos photos.safetensors --to timm[/]\n\n"
    "[bold]selfsight export runs/photos photos-hub/ --to hf[/]\n\n"
    "[bold]selfsight export runs/photos photos-maps/ --to features width=128[/]\n\n"
    "[bold]selfsight export runs/photos-finetune/best classifier.safetensors --to timm[/]\n\n"
    "[bold]selfsight export runs/photos/checkpoints/step-00001000 photos.onnx --to onnx[/]"
)
IMPORT_EXAMPLES = (
    "Examples:\n\n[bold]selfsight import mae_pretrain_vit_base.pth imported/mae_b --as mae[/]\n\n"
    "[bold]selfsight import dinov2-base/ imported/dinov2_b[/]\n\n"
    "[bold]selfsight import simmim_swin.pth imported/swin --as simmim --image-size 224[/]\n\n"
    "[bold]selfsight import small.pth imported/small --as dino heads=6[/]"
)
ENCODERS_EXAMPLES = "Example:\n\n[bold]selfsight encoders[/]"


def export(
    target: Annotated[str, typer.Argument(help="A run, a checkpoint, an encoder folder or an exported .safetensors.")],
    out: Annotated[Path, typer.Argument(help="The file to write; for hf and features a folder.")],
    to: Annotated[
        str,
        typer.Option(
            help="timm, safetensors, hf (a Hugging Face Hub folder), onnx or features (a multi-scale backbone)."
        ),
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Of features, such as window=0.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that is an earlier export.")] = False,
    head: Annotated[
        bool | None,
        typer.Option("--head/--no-head", help="With the head of a fine-tuned run; default: to timm and onnx."),
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="For images at their own shape: to onnx, timm (its NaFlexViT) or hf.")
    ] = False,
) -> None:
    """Write an encoder for use elsewhere, open it again and compare its features."""
    from launch.export_command import export as export_target

    export_target(target, out, to, overwrite, settings or (), head, native)


def import_(
    file: Annotated[
        Path, typer.Argument(help="A checkpoint: .pth, .pt or .bin of tensors, .safetensors, or a Hub model's folder.")
    ],
    out: Annotated[Path, typer.Argument(help="A new folder; probe it, export it, or start runs with init_from=OUT.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="What weights do not tell.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            "--as", help="Its layout: mae, dinov2, clip, timm ...; a wrong one lists all. Default: as its keys tell."
        ),
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Fit positions to images of this side in px.")] = None,
    mean: Annotated[str | None, typer.Option(help="Of its pixels, a value a channel: 0.5,0.5,0.5.")] = None,
    std: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    which: Annotated[str, typer.Option(help="teacher or student, where a checkpoint holds both.")] = "teacher",
    along: Annotated[
        str | None,
        typer.Option("--with", help="heads (and decoders: there must be some) or none. Default: those there are."),
    ] = None,
) -> None:
    """Read an official checkpoint, every key accounted for."""
    from pretrain.interop.official import describe, import_checkpoint

    imported = import_checkpoint(
        file,
        layout,
        out,
        overrides=overrides or (),
        image_size=image_size,
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        which=which,
        heads=_heads(along),
    )
    typer.echo(describe(imported, out))


def _heads(along: str | None) -> bool | None:
    if along not in (None, "heads", "none"):
        raise ValueError(f"--with is {along!r}; it takes heads or none")
    return None if along is None else along == "heads"


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} is {text!r}; write numbers with commas, such as 0.5,0.5,0.5") from None


def encoders() -> None:
    """Show which method works with which encoder, as a markdown table."""
    from pretrain.encoders.supported import table

    typer.echo(table())
