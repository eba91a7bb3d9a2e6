"""What one task finds out about its node before training: facts to compare, and troubles (imports no torch).

A trouble has a level:

    warn   training can run
    bad    it can't, or not as meant; of every node at once it is not the nodes' fault
    sick   it can't, and it is this node's own fault, whatever the others say
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import resource
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.files import check_writable
from data_pipelines.remote.cache import Cache, default_folder
from data_pipelines.remote.fetch import Patience
from data_pipelines.remote.urls import redact
from launch.cluster.gpus import Gpu, SmiError, driver_version, visible_gpus
from launch.cluster.rendezvous import Report, free_bytes
from launch.ranks import Ranks
from pretrain.config import Config

OUR_PACKAGES = ("data_pipelines", "eval", "launch", "pretrain", "slurm")
CODE = (".py", ".yaml", ".sbatch", ".c", ".h")
DISTRIBUTIONS = ("torch", "deepspeed", "timm", "numpy", "selfsight")  # whose versions change what is learned
SAMPLES_READ = 8  # of each data set, first and last among them
GIB = 2**30
#: A data set keeps up to 512 shards open, for which it takes half of the limit; the rest is for sockets and files.
MIN_OPEN_FILES = 1024
#: NCCL moves data between the GPUs of a node through /dev/shm, some tens of MB a rank; a container's default is 64 MB.
MIN_SHM_PER_TASK = 64 * 2**20
#: TMPDIR holds compiled kernels and locks. With less than the first nothing can be compiled; the second is comfortable.
MIN_TEMPORARY, GOOD_TEMPORARY = 2**28, 2 * GIB
#: A checkpoint of a small encoder with its optimizer; of a run that has one already, that one's size counts.
GOOD_ROOM = 5 * GIB
#: Memory on a GPU that nobody uses: what the driver itself keeps is below this.
MAX_USED_MIB = 1024


def look(config: Config, folder: Path, ranks: Ranks, report: Report, at: Callable[[str], None]) -> None:
    """Fill in a task's report. What holds for the whole node is looked at by its first task only.

    `at` is told what is looked at next, so that a task that gets stuck can be asked where. A check that fails with an
    error of its own is a trouble, never the end of the others.
    """
    with _timed(report, "versions"):
        report.facts |= versions() | {"code": code_checksum()}
        report.facts["commit"] = git_commit()
    checks: list[tuple[str, Callable[[], None]]] = [("master", lambda: _master(ranks, report))]
    if report.local_rank == 0:
        checks += [
            ("GPUs", lambda: _gpus(config, report)),
            ("limits", lambda: _limits(report)),
            ("disk", lambda: _disk(config, folder, report)),
            ("shards", lambda: _shards(config, report)),
        ]
    for name, check in checks:
        at(f"looking at {name}")
        with _timed(report, name):
            try:
                check()
            except (OSError, ValueError, RuntimeError) as error:
                report.trouble(name, "bad", _one_line(error))


def versions() -> dict[str, str | None]:
    """Of Python and what is installed beside it, without importing any of it."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["CUDA of torch"] = _torch_says("cuda")
    nccl = [d for d in importlib.metadata.distributions() if (d.name or "").startswith("nvidia-nccl")]
    found["NCCL"] = nccl[0].version if nccl else None
    return found


def code_checksum() -> str:
    """Of our packages' sources, as they lie on this node: a node with an old copy has another one."""
    return checksum_of({package: _root(package) for package in OUR_PACKAGES})


def checksum_of(folders: Mapping[str, Path]) -> str:
    """Of the sources in folders, by the names of the packages; where the folders lie does not count."""
    digest = hashlib.sha256()
    for package, root in folders.items():
        for path in sorted(path for path in root.rglob("*") if path.suffix in CODE and path.is_file()):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{package}/{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:12]


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def git_commit() -> str | None:
    """The commit of a checkout, with `+` where tracked files differ from it; None where there is none."""
    root = _root("launch").parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def checkpoint_bytes(folder: Path) -> int | None:
    """The size of a run's newest checkpoint; None where there is none yet."""
    found = sorted((folder / "checkpoints").glob("step-*"))
    return sum(path.stat().st_size for path in found[-1].rglob("*") if path.is_file()) if found else None


def open_data(config: Config) -> list[tuple[str, Dataset]]:
    """The data sets of a run, each with the path that names it."""
    data = config.data
    paths = [data.train] if isinstance(data.train, str) else [source.path for source in data.train]
    cache = Cache(
        cache_folder(config), int(data.cache.max_bytes), Patience(data.cache.tries, data.cache.timeout_seconds)
    )
    return [(redact(path), open_dataset(path, cache=cache, stage=data.stage)) for path in paths]


def cache_folder(config: Config) -> Path:
    """Where shards from elsewhere are kept on this node."""
    given = config.data.cache.dir
    return default_folder(config.data.stage) if given is None else Path(given).expanduser() / "shards"


def _master(ranks: Ranks, report: Report) -> None:
    """The name of the first node has to mean something here; whether it can be reached, the all-reduce tells."""
    try:
        addresses = socket.getaddrinfo(ranks.master_addr, ranks.master_port or 0, type=socket.SOCK_STREAM)
    except OSError as error:
        text = f"the first node's name {ranks.master_addr} cannot be resolved ({error}); set MASTER_ADDR to an address"
        report.trouble("master", "bad", text)
        return
    report.facts["master"] = addresses[0][4][0]


def _gpus(config: Config, report: Report) -> None:
    wanted, tasks = config.engine.device, report.local_tasks
    if wanted == "cpu":
        return
    try:
        gpus = visible_gpus(os.environ)
    except SmiError as error:
        # on nodes without GPUs it may be installed and find no driver; where others have some, the count tells
        report.facts["GPUs"] = 0
        report.trouble("GPUs", "sick" if wanted == "cuda" else "warn", str(error))
        return
    report.facts["GPUs"] = len(gpus or [])
    if not gpus:
        if wanted == "cuda":
            report.trouble("GPUs", "bad", "no GPU is visible, and engine.device is cuda")
        return
    report.facts |= {"driver": driver_version(), "GPU model": gpus[0].name}
    report.facts["GPU memory"] = None if gpus[0].memory is None else f"{round(gpus[0].memory / 1024)} GiB"
    report.troubles += [["GPUs", *trouble] for trouble in gpu_troubles(gpus, tasks)]


def gpu_troubles(gpus: list[Gpu], tasks: int) -> Iterator[tuple[str, str]]:
    """Level and text of what is wrong with a node's visible GPUs, of which each task is to have one."""
    if len(gpus) < tasks:
        yield "bad", f"{len(gpus)} GPUs are visible to {tasks} tasks; ask for --gpus-per-node={tasks}"
    if len(gpus) > tasks:
        yield "warn", f"{len(gpus) - tasks} of {len(gpus)} GPUs stay idle: one task a GPU, and there are {tasks}"
    if len({gpu.name for gpu in gpus}) > 1:
        yield "warn", f"GPUs of several models: {', '.join(sorted({gpu.name for gpu in gpus}))}"
    for gpu in gpus:
        if gpu.errors:
            yield "sick", f"GPU {gpu.index} has {gpu.errors} uncorrected memory errors (ECC)"
        if (gpu.used or 0) > MAX_USED_MIB or gpu.processes:
            by = f" by process {', '.join(map(str, gpu.processes))}" if gpu.processes else ""
            yield "sick", f"GPU {gpu.index} is in use{by}: {gpu.used} MiB are taken"


def _limits(report: Report) -> None:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    report.facts["open files"] = files if files != resource.RLIM_INFINITY else "unlimited"
    if files != resource.RLIM_INFINITY and files < MIN_OPEN_FILES:
        report.troubles.append(
            ["limits", "warn", f"{files} open files are allowed; `ulimit -n {MIN_OPEN_FILES}` or more"]
        )
    with_gpus, infiniband = report.facts.get("GPUs"), Path("/sys/class/infiniband").is_dir()
    memory = Path("/dev/shm")
    if with_gpus and memory.is_dir() and free_bytes(memory) < MIN_SHM_PER_TASK * report.local_tasks:
        text = f"/dev/shm has {_size(free_bytes(memory))} free, and NCCL needs {_size(MIN_SHM_PER_TASK)} a GPU"
        report.trouble("limits", "bad", f"{text}; in a container, --shm-size")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if with_gpus and infiniband and locked != resource.RLIM_INFINITY:
        text = f"InfiniBand wants unlimited locked memory, and {_size(locked)} are allowed (`ulimit -l`)"
        report.trouble("limits", "warn", text)


def _disk(config: Config, folder: Path, report: Report) -> None:
    room, checkpoint = free_bytes(folder), checkpoint_bytes(folder)
    report.facts["room in the run folder"] = room
    if checkpoint is not None and room < checkpoint:
        text = f"{_size(room)} free in {folder}, and a checkpoint takes {_size(checkpoint)}"
        report.trouble("disk", "bad", text)
    elif checkpoint is None and room < GOOD_ROOM:
        report.trouble("disk", "warn", f"only {_size(room)} free in {folder}, where checkpoints go")
    temporary = Path(os.environ.get("TMPDIR") or "/tmp")
    check_writable(temporary)
    if free_bytes(temporary) < GOOD_TEMPORARY:
        level = "bad" if free_bytes(temporary) < MIN_TEMPORARY else "warn"
        report.trouble("disk", level, f"{_size(free_bytes(temporary))} free in TMPDIR, {temporary}")


def _shards(config: Config, report: Report) -> None:
    checksums, read, seconds = [], 0, 0.0
    for path, dataset in open_data(config):
        with dataset:
            checksums.append(dataset.checksum)
            before = time.monotonic()
            here = [sample for sample in spread(dataset.num_samples) if _is_local(dataset, sample)]
            for sample in here:
                read += len(dataset.read(sample).image)
                dataset.check_unchanged(sample)
            seconds += time.monotonic() - before
            if dataset.fetches:
                _cache(config, path, dataset, report)
    report.facts["shards"] = hashlib.sha256(" ".join(checksums).encode()).hexdigest()[:12]
    report.seconds["reading samples"] = seconds


def _cache(config: Config, path: str, dataset: Dataset, report: Report) -> None:
    """Shards from elsewhere are not fetched here; there must be room for them."""
    folder, largest = cache_folder(config), int(dataset.index.sizes.max())
    check_writable(folder)
    room, whole = free_bytes(folder), int(dataset.index.sizes.sum())
    if room < 2 * largest:
        text = f"{_size(room)} free in the cache {folder}, and a shard of {path} takes up to {_size(largest)}"
        report.trouble("shards", "bad", text)
    elif not folder.exists() and room < min(whole, int(config.data.cache.max_bytes)):
        text = f"{_size(room)} free in the cache {folder}, less than {path}: shards are fetched again and again"
        report.trouble("shards", "warn", text)


def spread(count: int) -> list[int]:
    """First, last and some between of so many samples."""
    return sorted({round(position * (count - 1) / max(1, SAMPLES_READ - 1)) for position in range(SAMPLES_READ)})


def _is_local(dataset: Dataset, sample: int) -> bool:
    return dataset.fetched(int(dataset.shards_of([sample])[0])) is None


def _torch_says(name: str) -> str | None:
    """What torch/version.py says, read as text: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(rf"^{name}\b[^=]*=\s*'([^']*)'", text, re.MULTILINE)
    return match[1] if match else None


@contextmanager
def _timed(report: Report, name: str) -> Iterator[None]:
    before = time.monotonic()
    yield
    report.seconds[name] = round(time.monotonic() - before, 4)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _size(number: float) -> str:
    unit = min(int(math.log(max(number, 1), 1024)), 4)
    value = number / 1024**unit
    return f"{value:.{1 if unit and value < 10 else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
