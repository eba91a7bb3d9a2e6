"""From `python -m pretrain` to the end of the first step: where the time goes, and against another checkout.

    python tests/bench/start_to_first_step.py [--ranks 2] [--turns 5] [--against CHECKOUT]

A tiny MAE on built-in images, so that the start is all there is. Each turn starts every side once, one after the
other; the time is taken from outside, from the start of the process to its line about step 1, and CPU seconds are those
of all ranks. CHECKOUT is another state of this repository, such as `git worktree add ../before COMMIT` makes. Then the
seconds of each phase as the run's history has them, and how long it takes to be told of data that are not there.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HERE), str(HERE / "tests" / "pretrain")]
SMALL = (
    "train.epochs=null", "train.steps=1", "train.batch_size=16", "optim.warmup_epochs=0", "encoder.depth=2",
    "tracking.pictures_every_steps=0", "engine.device=cpu", "engine.threads=1",
)  # fmt: skip


class Start(NamedTuple):
    """One start: seconds until the first step was told of (or the refusal), and CPU seconds of all its processes."""

    wall: float
    cpu: float


def start(checkout: Path, folder: Path, ranks: int, data: Path, name: str) -> Start:
    """Start a run of one step."""
    command = [sys.executable, "-m", "launch", "pretrain"]
    if ranks > 1:
        command = [sys.executable, "-m", "launch", "launch", "--nproc", str(ranks)]
    environ = {**os.environ, "PYTHONPATH": str(checkout), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    before, cpu = time.monotonic(), _cpu()
    process = subprocess.Popen(
        [*command, "mae_vit_cifar_cpu", f"--data={data}", f"runs={folder / 'runs'}", f"name={name}", *SMALL],
        env=environ, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout
    wall, told = float("nan"), []
    for line in process.stdout:
        told.append(line)
        if line.startswith(("step 1/", "error: ")) and wall != wall:
            wall = time.monotonic() - before
    process.wait()
    if wall != wall:
        raise SystemExit(f"no first step:\n{''.join(told)}")
    return Start(wall, _cpu() - cpu)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    given = parser.parse_args()
    from tiny import write_shards

    from pretrain.survival.history import read_history

    sides = {"here": HERE} | ({"against": given.against.resolve()} if given.against else {})
    runs: dict[str, list[Start]] = {side: [] for side in sides}
    refusals: dict[str, list[Start]] = {side: [] for side in sides}
    phases: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "shards").mkdir()
        write_shards(folder / "shards")
        for turn in range(given.turns + 1):  # the first one warms the caches and counts for nothing
            for side, checkout in sides.items():
                name = f"{side}-{turn}"
                begun = start(checkout, folder, given.ranks, folder / "shards", name)
                refused = start(checkout, folder, given.ranks, folder / "none", f"{name}-refused")
                if turn:
                    runs[side].append(begun)
                    refusals[side].append(refused)
            if turn:
                history = read_history(folder / "runs" / f"here-{turn}")
                phases.append(next(event["seconds"] for event in history if event["event"] == "started"))
    print(f"{given.ranks} rank(s), medians of {given.turns} turns: seconds, and CPU seconds of all processes")
    for what, measured in (("first step", runs), ("data missing", refusals)):
        for side in sides:
            wall = statistics.median(each.wall for each in measured[side])
            cpu = statistics.median(each.cpu for each in measured[side])
            print(f"  {what:12}  {side:8}  {wall:6.2f}  cpu {cpu:6.2f}")
        if given.against:
            ratios = [b.wall / a.wall for a, b in zip(measured["here"], measured["against"], strict=True)]
            work = [b.cpu / a.cpu for a, b in zip(measured["here"], measured["against"], strict=True)]
            print(f"  {'':12}  ratio     {statistics.median(ratios):6.2f}  cpu {statistics.median(work):6.2f}")
    print("phases of rank 0:")
    for phase in phases[0]:
        print(f"  {phase:16}  {statistics.median(each.get(phase, 0.0) for each in phases):6.2f}")


if __name__ == "__main__":
    main()
