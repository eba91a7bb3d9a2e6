"""Training beside other work on the same cores: OpenMP threads that sleep at a barrier, against threads that spin.

    python tests/bench/busy_machine.py [--busy 0 1 6] [--turns 5] [--seconds 3]

One process for each preset and policy builds the preset's model and takes steps on random crops when it is told to, all
in turn, beside so many processes that do nothing but compute. `spinning` is libgomp's own default, in which training
ran before; `ours` is what `selfsight` sets for its processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HERE), str(HERE / "tests" / "pretrain")]
from data_pipelines.cores import WAITING, sleep_at_barriers  # noqa: E402

PRESETS = ("demo", "mae_vit_cifar_cpu")
TARGETS = {0: None, 1: 1.8, 6: 4.0}
SPIN = "while True: pass"


def serve(preset: str) -> None:
    """Take steps for as many seconds as a line on stdin says, and answer with images per second."""
    if os.environ.pop("BENCH_SIDE") == "ours":
        sleep_at_barriers(os.environ)
    import torch
    from tiny import random_batch

    from pretrain.config.load import load_config
    from pretrain.engines.engine import build_engine, initialise_distributed
    from pretrain.engines.schedules import Timeline
    from pretrain.methods.base import Normalisation
    from pretrain.methods.registry import build_method

    config = load_config(preset, ["data.train=unused", f"runs={tempfile.gettempdir()}", "engine.device=cpu"])
    device = torch.device("cpu")
    initialise_distributed(device)
    torch.manual_seed(0)
    method = build_method(config, Normalisation((0.5,) * 3, (0.25,) * 3), Timeline(100, 10.0))
    engine = build_engine(config, method, device, 1)
    batch = random_batch(config, config.train.batch_size)

    def step() -> None:
        engine.backward(engine(batch, 0)["loss"])
        engine.step()
        method.after_step(0)

    step()
    print("ready", flush=True)
    for line in sys.stdin:
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < float(line):
            step()
            count += 1
        print(count * config.train.batch_size / (time.perf_counter() - start), flush=True)


def started(held: ExitStack, preset: str, side: str) -> subprocess.Popen[str]:
    """A process that serves, once it is ready."""
    kept = {name: value for name, value in os.environ.items() if name not in WAITING}
    command = [sys.executable, __file__, "--serve", preset]
    process = held.enter_context(
        subprocess.Popen(
            command, env={**kept, "BENCH_SIDE": side}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    )
    held.callback(process.kill)
    assert process.stdout
    while process.stdout.readline() not in ("ready\n", ""):
        pass
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=list(TARGETS), help="so many processes beside it")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
        return
    for preset in PRESETS:
        with ExitStack() as held:
            sides = {side: started(held, preset, side) for side in ("ours", "spinning")}
            for busy in given.busy:
                rates: dict[str, list[float]] = {side: [] for side in sides}
                with ExitStack() as beside:
                    for _ in range(busy):
                        hog = beside.enter_context(subprocess.Popen([sys.executable, "-S", "-c", SPIN]))
                        beside.callback(hog.kill)
                    for _ in range(given.turns):
                        for side, process in sides.items():
                            assert process.stdin
                            assert process.stdout
                            process.stdin.write(f"{given.seconds}\n")
                            process.stdin.flush()
                            rates[side].append(float(process.stdout.readline()))
                ours, spinning = (statistics.median(rates[side]) for side in ("ours", "spinning"))
                aim = "" if TARGETS.get(busy) is None else f" (target {TARGETS[busy]:g} x)"
                print(
                    f"{preset} beside {busy} busy processes: {ours:,.0f} against {spinning:,.0f} images/s = "
                    f"{ours / spinning:.2f} x{aim}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
