"""What `selfsight export` does besides writing files: finding the encoder and its probes, and telling what came out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

_SPLITS = ("train", "val")


def export(
    target: str, out: Path, to: str, overwrite: bool, settings: Sequence[str] = (), head: bool | None = None,
    native: bool = False,
) -> None:  # fmt: skip
    """Export what TARGET names and print how to use it; see `pretrain.interop.export` for the errors.

    head: with the head that was trained on labels; None: where there is one and the format takes it. native: for images
    at their own shape, see `pretrain.interop.native_export`.
    """
    from pretrain.encoder_folder import TIMM_PREFIX, find_encoder

    if target.startswith(TIMM_PREFIX):
        raise ValueError(f"{target} is a model that timm has already; name a run, a checkpoint or an encoder folder")
    source = find_encoder(Path(target).expanduser())
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; choose another place, or replace it (--overwrite)")
    from eval.target import run_of
    from pretrain.encoders.saved import read_card
    from pretrain.interop.classifier import FORMATS, export_classifier, is_classifier, task_of
    from pretrain.interop.export import export_encoder

    if native and (head or settings):
        raise ValueError("--native is of an encoder without head and settings; leave out one of them")
    if to == "openclip":
        from pretrain.interop.openclip import TOLERANCE, export_openclip

        if settings or head or native:
            raise ValueError("--to openclip takes no settings, no head and no --native; leave them out")
        pair = export_openclip(source, out, overwrite=overwrite)
        print(
            f"wrote {pair.path} ({pair.num_bytes / 1e6:.1f} MB). Opened by OpenCLIP, embeddings of random images and "
            f"of texts differ by at most {pair.difference:.2g} (allowed {TOLERANCE:g}).\n\n{pair.usage}"
        )
        return
    if head is None and not native:
        head = to in FORMATS and is_classifier(source)
    if head:
        if settings:
            raise ValueError(f"{settings[0]} is a setting of --to features, and a classifier has none; leave it out")
        made = export_classifier(source, out, to, overwrite=overwrite)
        what = f"the encoder and its head for {task_of(source).replace('_', ' ')}"
        print(
            f"wrote {made.path} ({made.num_bytes / 1e6:.1f} MB), {what}. Opened again, its outputs for random "
            f"images differ by at most {made.difference:.2g} (allowed {made.tolerance:g}).\n\n{made.usage}"
        )
        return
    run = run_of(source)
    tables = list(probe_tables(run or source, read_card(source).step)) if to == "hf" else []
    if native:
        from pretrain.interop.native_export import export_native

        done = export_native(source, out, to, run=run, probes=tables, overwrite=overwrite)
    else:
        done = export_encoder(source, out, to, run=run, probes=tables, settings=settings, overwrite=overwrite)
    print(
        f"wrote {done.path} ({done.num_bytes / 1e6:.1f} MB). Opened again, its features of random images differ by "
        f"at most {done.difference:.2g} (allowed {done.tolerance:g}).\n\n{done.usage}"
    )


def probe_tables(folder: Path, step: int) -> Iterator[str]:
    """Markdown of every probe of the encoder of `step` that was written to `folder`/eval."""
    from data_pipelines.files import read_json
    from eval.report import markdown_table

    for path in sorted((folder / "eval").glob("probe-*.json")):
        results: Any = read_json(path)
        try:
            if results["target"]["step"] == step:
                yield f"{markdown_table(results).rstrip()}\n{_labelled(results)}"
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a result of `selfsight probe` as this version writes it ({error!r}); "
                "probe again, or move it away"
            ) from error


def _labelled(results: dict[str, Any]) -> str:
    """Which labelled images were used, by name and checksum, and at what size."""
    data, side = results["data"], results["target"]["image_size"]
    named = (f"{split} `{PurePath(data[split]['spec']).name}` ({data[split]['checksum'][:16]})" for split in _SPLITS)
    return f"- labelled images: {', '.join(named)}, at {side}x{side} px"
