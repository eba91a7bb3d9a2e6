"""Step time and memory of every registered family of encoders at about equal parameters, as a table in markdown.

Rows are those of `selfsight encoders`. A family is taken at that of its sizes whose parameters are nearest to --params,
a timm row at the name of its kind that is. A step is forward, backward and AdamW of the encoder alone, on noise. Each
row takes turns with a ViT of about as many parameters: the medians of both, and their ratio. The peak memory of a step,
beyond weights, gradients and the optimizer's state, is measured in a process of its own.

    python tests/bench/families.py [--params 22e6] [--batch 8] [--size 224] [--turns 5] [--rows cait repvgg]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import timm
import torch
from _memory import last_number, peak_of

from pretrain.encoders import Encoder, build_encoder
from pretrain.encoders.registry import FAMILIES

#: Names of timm that one kind is looked for in at most: each is built once without weights.
MOST_NAMES = 8


def variants(family: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings of a row at each of its family's sizes; of a timm row, with each name of its kind."""
    if family == "timm":
        kind = re.match(r"[a-z]+(v\d+|0\d)?", settings["model"])
        assert kind is not None
        names = [name for name in timm.list_models(f"{kind[0]}*") if re.fullmatch(rf"{kind[0]}([_\d].*)?", name)]
        names = [name for name in names if not re.search("large|huge|giant|enormous|so400m|384|448|512", name)]
        own = [settings["model"]]
        yield from (
            {**settings, "model": name} for name in (own + [name for name in names if name != own[0]])[:MOST_NAMES]
        )
        return
    hint = get_type_hints(FAMILIES[family].config).get("size")
    sizes = get_args(hint) if get_origin(hint) is Literal else ()
    yield from ({**settings, "size": size} for size in sizes) if sizes else (settings,)


def built(family: str, settings: dict[str, Any], size: int, device: str) -> tuple[Encoder, int]:
    """An encoder for images of `size` px, or of timm's own size where it does not take those; and its images' side."""
    with torch.device(device):
        config = FAMILIES[family].config(**settings)
        try:
            return build_encoder(config, (size, size)), size
        except ValueError:
            if family != "timm":
                raise
            side = FAMILIES[family].survey_of(config, None, None).image_size[0]
            return build_encoder(config, (side, side)), side


def millions(encoder: Encoder) -> float:
    return sum(parameter.numel() for parameter in encoder.parameters()) / 1e6


def nearest(family: str, settings: dict[str, Any], params: float, size: int) -> dict[str, Any]:
    """The variant of a row whose parameters are nearest to `params`, by ratio; sizes ascend, so a large one ends it."""
    best, closest = settings, float("inf")
    for variant in variants(family, settings):
        try:
            ratio = millions(built(family, variant, size, "meta")[0]) * 1e6 / params
        except Exception as error:  # of a thousand names of timm, some can't be built without weights
            print(f"left out: {variant}: {type(error).__name__}", file=sys.stderr)
            continue
        if max(ratio, 1 / ratio) < closest:
            best, closest = variant, max(ratio, 1 / ratio)
        if closest < 1.15 or (ratio > 1 and family != "timm"):
            break
    return best


def training_step(encoder: Encoder, side: int, batch_size: int, device: torch.device) -> Callable[[], None]:
    encoder.to(device).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), 1e-4, fused=True)
    images = torch.randn(batch_size, 3, side, side, device=device)

    def step() -> None:
        features = encoder(images)
        optimizer.zero_grad()
        (features.pooled.square().mean() + features.tokens.square().mean()).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def in_turns(first: Callable[[], None], second: Callable[[], None], turns: int) -> tuple[float, float]:
    """Median seconds of both, one after the other in each turn."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for step, taken in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            step()
            if turn:  # the first warms up
                taken.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, default=22e6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", nargs="*", default=[], help="only rows whose names hold one of these")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-of", nargs=2, metavar=("FAMILY", "SETTINGS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    if arguments.memory_of:
        family, written = arguments.memory_of
        encoder, side = built(family, json.loads(written), arguments.size, "cpu")
        print(peak_of(training_step(encoder, side, arguments.batch, device), device))
        return
    yardstick, side = built("vit", nearest("vit", {}, arguments.params, arguments.size), arguments.size, "cpu")
    vit = training_step(yardstick, side, arguments.batch, device)
    print(
        f"| encoder | px | parameters | images/s | step against a ViT's of {millions(yardstick):.1f} M | peak memory |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    rows = [(spec.name, dict(example.settings)) for spec in FAMILIES.values() for example in spec.examples]
    for family, settings in rows:
        name = settings.get("model", ", ".join([family, *(f"{key}={value}" for key, value in settings.items())]))
        if arguments.rows and not any(part in name for part in arguments.rows):
            continue
        chosen = nearest(family, settings, arguments.params, arguments.size)
        told = f"timm:{chosen['model']}" if family == "timm" else f"{name}, size={chosen.get('size', 'its only one')}"
        try:
            encoder, side = built(family, chosen, arguments.size, "cpu")
            own, vits = in_turns(training_step(encoder, side, arguments.batch, device), vit, arguments.turns)
            command = [
                sys.executable,
                __file__,
                "--memory-of",
                family,
                json.dumps(chosen),
                "--batch",
                str(arguments.batch),
            ]
            memory = last_number([*command, "--size", str(arguments.size), "--device", arguments.device])
        except Exception as error:
            print(
                f"| `{told}` | {arguments.size} | not measured: {type(error).__name__}: {str(error)[:80]} | | | |",
                flush=True,
            )
            continue
        print(
            f"| `{told}` | {side} | {millions(encoder):.1f} M | {arguments.batch / own:.1f} | {own / vits:.2f} x | "
            f"{memory:,.0f} MB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
