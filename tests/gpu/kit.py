"""What a CPU can't measure, on a GPU, by one command in under eight minutes; see README.md beside this.

    python tests/gpu/kit.py [--out gpu-kit] [--only speed sync] [--rehearse]

Each part is a fork of a process that has imported torch and has not touched the GPU, with seconds of its own: one that
fails, hangs or dies costs no other. Writes results.json, table.md and a log for each part.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HERE), str(HERE / "tests" / "pretrain"), str(HERE / "tests" / "bench"), str(HERE / "tests" / "gpu")]
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asks whether there is a GPU without touching it

from data_pipelines.cores import sleep_at_barriers  # noqa: E402

sleep_at_barriers(os.environ)

from parts import PARTS, Kit, Part  # noqa: E402
from table import markdown  # noqa: E402

#: Seconds for everything: a part that could not end before is not begun.
ALL_SECONDS = 470.0
LAST_LINES = 20


def run(part: Part, kit: Kit, seconds: float) -> dict[str, Any]:
    """One part in a process of its own, and what came of it: `status` is ok, failed, or timeout."""
    name = part.name.replace("/", "-")
    answer, log = kit.out / "parts" / f"{name}.json", kit.out / "parts" / f"{name}.log"
    for path in (answer, log):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    began = time.monotonic()
    child = os.fork()
    if not child:
        become(part, kit, answer, log)
    status, late = None, False
    while status is None:
        pid, ended = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(ended) if pid else None
        if status is None and not late and time.monotonic() - began > seconds:
            late = True
            kill(child)
        time.sleep(0.02)
    kill(child)  # what it started
    taken = round(time.monotonic() - began, 1)
    found = json.loads(answer.read_text()) if answer.exists() else {}
    if status == 0 and found:
        return {"status": "ok", "seconds": taken, "found": found}
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    why = f"not done after {seconds:.0f} s" if late else (lines[-1] if lines else f"it ended with code {status}")
    return {
        "status": "timeout" if late else "failed",
        "seconds": taken,
        "why": why,
        "log": lines[-LAST_LINES:],
        "found": found,
    }


def kill(process: int) -> None:
    """End a process and all that it started, if any is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)


def become(part: Part, kit: Kit, answer: Path, log: Path) -> None:
    """Be the process of a part; does not return."""
    code = 1
    try:
        os.setsid()
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        found = part.run(kit)
        answer.write_text(json.dumps(found))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def machine(kit: Kit) -> dict[str, Any]:
    """Where this runs; asked in a process of its own, for a fork of one that has used a GPU can't."""
    import torch

    about: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    about |= {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        os.write(writer, name.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        about["device"] = told.read()
    os.waitpid(child, 0)
    return about


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-kit"), help="where results.json and table.md go")
    parser.add_argument("--only", nargs="+", help="parts whose names begin so")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, to see that it runs to its end")
    given = parser.parse_args()
    kit = Kit(given.out.resolve(), given.rehearse)
    (kit.out / "parts").mkdir(parents=True, exist_ok=True)
    about = machine(kit)
    if about["device"] == "no GPU" and not kit.rehearse:
        print("error: torch sees no GPU; --rehearse runs everything at tiny sizes on the CPU", file=sys.stderr)
        return 2
    if kit.rehearse:  # what parts share; on a GPU, importing DeepSpeed asks the device, and no fork could use it then
        import torch._dynamo

        from pretrain.engines.engine import import_deepspeed

        import_deepspeed(torch.device("cpu"))
    gc.freeze()
    began, results = time.monotonic(), dict[str, Any]()
    for part in PARTS:
        if given.only and not part.name.startswith(tuple(given.only)):
            continue
        left = ALL_SECONDS - (time.monotonic() - began)
        if left < part.seconds / 2:
            results[part.name] = {"status": "not begun", "seconds": 0.0, "why": f"{left:.0f} s were left", "found": {}}
        else:
            results[part.name] = run(part, kit, min(part.seconds, left))
        now = results[part.name]
        print(f"{part.name:24} {now['status']:9} {now['seconds']:6.1f} s  {now.get('why', '')}", flush=True)
        about["seconds"] = round(time.monotonic() - began, 1)
        whole = {"machine": about, "rehearsed": kit.rehearse, "parts": results}
        (kit.out / "results.json").write_text(json.dumps(whole, indent=2) + "\n")
        (kit.out / "table.md").write_text(markdown(whole))
    print(f"{kit.out / 'table.md'}, {kit.out / 'results.json'}")
    return int(any(result["status"] != "ok" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
