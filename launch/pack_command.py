"""The `selfsight pack` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

EXIT_INTERRUPTED = 130  # as shells tell of Ctrl-C
PACK_EXAMPLES = (
    "Examples:\n\n[bold]selfsight pack photos/ shards/ --val-share 0.05[/]\n\n"
    "[bold]selfsight pack 'old/train-{000000..000099}.tar' shards/ --max-short-side 320[/]\n\n"
    "[bold]selfsight pack ADE/images shards/ --masks ADE/annotations[/]\n\n"
    "[bold]selfsight pack clips/ shards/ --from stacks[/]\n\n"
    "[bold]selfsight pack scans.csv shards/ --root /archive --bad refuse[/]\n\n"
    "[bold]selfsight pack patients.csv shards/ --group-column patient --val-share 0.2[/]"
)


def pack(
    images: Annotated[
        str,
        typer.Argument(
            help="A folder of images (train/CLASS/*, CLASS/* or just images), tars, parquet or arrow files; such "
            "files by * or {000..009}; or a .csv, .tsv or .parquet list of paths."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder that gets the shards and dataset.json.")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="folder, stacks (a folder of frames for each), tars, parquet, arrow or list; default: what is there.",
        ),
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Where a list's relative paths begin; default: its folder.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Of a table; default: by type and usual names.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Likewise.")] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Of a table: what train and val must not share, such as patient.")
    ] = None,
    group_pattern: Annotated[
        str | None, typer.Option(help="The same from paths, by a regular expression: '(p[0-9]+)_' of a/p12_003.png.")
    ] = None,
    labels: Annotated[bool, typer.Option(help="Carry labels along.")] = True,
    split_folders: Annotated[
        bool, typer.Option(help="Folders named train, val, test, unlabeled are splits; else they are classes.")
    ] = True,
    dicom_window: Annotated[
        str | None,
        typer.Option(metavar="CENTRE,WIDTH", help="Of DICOM files, to 8 bits; default: all their levels."),
    ] = None,
    split: Annotated[str, typer.Option(help="The images' split, where IMAGES has no train/ and val/.")] = "train",
    val_share: Annotated[float, typer.Option(help="Share of every class to hold back as split val.")] = 0.0,
    leave_out: Annotated[
        Path | None, typer.Option(help="A list of images not to pack, as `selfsight data dedupe` writes.")
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(help="A folder of masks: a/b.png of the image a/b.jpg; a.mask.png beside a.jpg needs none."),
    ] = None,
    mask_column: Annotated[
        str | None, typer.Option(help="Of a table: paths of masks, as those of images; or, beside images, masks.")
    ] = None,
    depths: Annotated[Path | None, typer.Option(help="Likewise of depths or heights: PNG of 16 bits, or .npy.")] = None,
    mask_names: Annotated[
        Path | None,
        typer.Option(help='Of the levels of masks: a file of lines `0 sky`, or of JSON, {"0": "sky"}.'),
    ] = None,
    max_short_side: Annotated[
        int | None, typer.Option(help="Re-encode larger images as JPEGs with a short side of so many px.")
    ] = None,
    quality: Annotated[int | None, typer.Option(help="Of re-encoded images, 1 to 95; default 90.")] = None,
    subsampling: Annotated[str | None, typer.Option(help="Of their chroma: 4:2:0 (default), 4:2:2 or 4:4:4.")] = None,
    reencode_all: Annotated[bool, typer.Option("--reencode-all", help="Re-encode small images too.")] = False,
    bad: Annotated[
        str, typer.Option(help="skip images that cannot be used, and list them; or refuse to go on.")
    ] = "skip",
    check: Annotated[str, typer.Option(help="Look at each image's header, or decode it in full.")] = "header",
    samples_per_shard: Annotated[int, typer.Option(help="At most.")] = 10_000,
    bytes_per_shard: Annotated[int, typer.Option(help="About.")] = 512 << 20,
    seed: Annotated[int, typer.Option(help="Of the shuffle and of what is held back.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one a core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove what an earlier pack wrote to OUT.")] = False,
    progress: Annotated[bool, typer.Option(help="Show how far it is, and what came out.")] = True,
) -> None:
    """Pack images into shuffled WebDataset shards with an index; the same command again goes on after a stop."""
    from data_pipelines.packing.reencode import Reencoding
    from data_pipelines.packing.sources.base import Columns
    from data_pipelines.packing.write import pack as pack_images

    reencoding = None
    if max_short_side is not None or reencode_all:
        told = {"quality": quality, "subsampling": subsampling}
        given: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
        reencoding = Reencoding(max_short_side, everything=reencode_all, **given)
    elif quality is not None or subsampling is not None:
        raise ValueError(
            "--quality and --subsampling are of re-encoded images; give --max-short-side or --reencode-all"
        )
    try:
        pack_images(
            images,
            out,
            kind=kind,
            root=root,
            columns=Columns(image_column, label_column, group_column, mask_column),
            labels=labels,
            split_folders=split_folders,
            group_pattern=group_pattern,
            dicom_window=_window(dicom_window),
            split=split,
            val_share=val_share,
            samples_per_shard=samples_per_shard,
            bytes_per_shard=bytes_per_shard,
            seed=seed,
            reencoding=reencoding,
            bad=bad,
            check=check,
            leave_out=leave_out,
            masks=masks,
            depths=depths,
            mask_names=mask_names,
            workers=workers,
            overwrite=overwrite,
            progress=progress,
        )
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on with what is finished in {out}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _window(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        centre, width = map(float, text.split(","))
    except ValueError:
        centre, width = 0.0, 0.0
    if not width >= 1:
        raise ValueError(f"--dicom-window is {text!r}; it is a centre and a width of 1 or more, such as 40,400")
    return centre, width
