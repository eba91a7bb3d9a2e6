"""What a job asks SLURM for, checked against what the cluster has (imports no torch)."""

from __future__ import annotations

import difflib
import getpass
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.cluster.quoting import sbatch_line
from launch.cluster.slurm import Node, Partition, accounts_of, gpus_of, partitions, seconds_of

#: How long before its time limit a run is asked to write a checkpoint; less where the limit itself is short.
SIGNAL_SECONDS = 180


@dataclass(frozen=True)
class Resources:
    """What one job asks for; None is SLURM's default."""

    nodes: int = 1
    gpus_per_node: str | None = None  # a number, or TYPE:NUMBER
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    memory: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    mail: str | None = None
    signal_seconds: int = SIGNAL_SECONDS
    gpus_by: str = "gpus-per-node"  # or gres
    further: tuple[tuple[str, str | None], ...] = ()  # options of sbatch that are passed on, and their values

    @property
    def ranks(self) -> int:
        """Processes of a training job: one a GPU."""
        return self.nodes * self.tasks_per_node

    def lines(self) -> list[str]:
        """As #SBATCH lines. Raises ValueError for values that such lines can't hold."""
        options: list[tuple[str, str | int | None]] = [
            ("partition", self.partition),
            ("account", self.account),
            ("qos", self.qos),
            ("constraint", self.constraint),
            ("exclude", self.exclude),
            ("nodes", self.nodes),
            ("gpus-per-node", self.gpus_per_node if self.gpus_by == "gpus-per-node" else None),
            ("gres", f"gpu:{self.gpus_per_node}" if self.gpus_by == "gres" and self.gpus_per_node else None),
            ("ntasks-per-node", self.tasks_per_node),
            ("cpus-per-task", self.cpus_per_task),
            ("mem", self.memory),
            ("time", self.time),
            ("mail-user", self.mail),
            ("mail-type", None if self.mail is None else "END,FAIL"),
            ("signal", f"B:USR1@{self.signal_seconds}"),
        ]
        own = [sbatch_line(option, value) for option, value in options if value is not None]
        return own + [sbatch_line(option, value) for option, value in self.further]


def lead_time(asked: int | None, time: str | None) -> int:
    """Seconds before the time limit at which a run is asked to stop. Refuses a lead that the limit does not leave."""
    limit = None if time is None else seconds_of(time)
    if asked is None:
        return SIGNAL_SECONDS if limit is None else min(SIGNAL_SECONDS, limit // 4)
    if limit is not None and asked >= limit:
        raise ValueError(
            f"--signal-seconds {asked} is no less than the time limit {time} ({limit} s): every job would be asked to "
            f"stop as it starts; give at most {limit // 2}, or a longer --time"
        )
    return asked


def with_time(asked: Resources, default_seconds: int, ask_slurm: bool = True) -> Resources:
    """What is asked for, with a time limit: where none is named, the default, or less where that is not allowed."""
    if asked.time is not None:
        return asked
    names = None if asked.partition is None else asked.partition.split(",")
    known = partitions() if ask_slurm else []
    chosen = [one for one in known if (one.default if names is None else one.name in names)]
    seconds = min([default_seconds, *(one.max_seconds for one in chosen if one.max_seconds is not None)])
    time = _duration(seconds)
    return replace(asked, time=time, signal_seconds=lead_time(None, time))


def check_resources(asked: Resources, what: str = "") -> list[str]:
    """Refuse what the cluster has not, naming what it has; returns what a user should know besides.

    what: which of several jobs it is about, in front of a message.
    """
    try:
        return _check(asked)
    except ValueError as error:
        raise ValueError(f"{what}{error}") from None


def _check(asked: Resources) -> list[str]:
    known = partitions()
    names = [partition.name for partition in known]
    if asked.partition is None:
        chosen = [partition for partition in known if partition.default]
        if not chosen:
            raise ValueError(f"this cluster has no default partition; choose one: --partition {' or '.join(names)}")
    else:
        chosen = []
        for name in asked.partition.split(","):
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}? Partitions here" if near else "those here are"
                raise ValueError(f"there is no partition {name!r}; {hint}: {', '.join(names)}")
            chosen.append(known[names.index(name)])
    problems = [(partition, _problem(asked, partition)) for partition in chosen]
    if all(problem is not None for _, problem in problems):  # of several, SLURM takes the first that can
        raise ValueError("; ".join(problem for _, problem in problems if problem is not None))
    _check_account(asked)
    if gpus_of(asked.gpus_per_node)[1] == 0 and any(sum(node.gpus.values()) for node in chosen[0].nodes):
        most = max(sum(node.gpus.values()) for node in chosen[0].nodes)
        return [f"the nodes of {chosen[0].name} have up to {most} GPUs and the job asks for none (--gpus-per-node)"]
    return []


def _problem(asked: Resources, partition: Partition) -> str | None:
    name = f"partition {partition.name}"
    if not partition.up:
        return f"{name} takes no jobs at present; choose another --partition"
    limit = None if asked.time is None else seconds_of(asked.time)
    if (
        asked.time is not None
        and partition.max_seconds is not None
        and (limit is None or limit > partition.max_seconds)
    ):
        return (
            f"--time {asked.time} is beyond what {name} allows, {_duration(partition.max_seconds)}; ask for no more, a "
            "run continues by itself in a next job"
        )
    if partition.max_nodes is not None and asked.nodes > partition.max_nodes:
        return f"--nodes {asked.nodes}: a job of {name} may have {partition.max_nodes} at most"
    if asked.nodes > len(partition.nodes):
        return f"--nodes {asked.nodes}: {name} has {len(partition.nodes)}"
    kind, gpus = gpus_of(asked.gpus_per_node)
    if gpus:
        enough = [node for node in partition.nodes if _gpus(node, kind) >= gpus]
        if len(enough) < asked.nodes:
            most = sorted({", ".join(_gpu_words(node)) or "none" for node in partition.nodes})
            return (
                f"--gpus-per-node {asked.gpus_per_node}: {len(enough)} nodes of {name} have so many, and {asked.nodes} "
                f"are asked for; GPUs of its nodes: {' or '.join(most)}"
            )
    cpus = asked.tasks_per_node * (asked.cpus_per_task or 1)
    most_cpus = sorted((node.cpus for node in partition.nodes), reverse=True)[asked.nodes - 1]
    if cpus > most_cpus:
        return (
            f"--cpus-per-task {asked.cpus_per_task or 1} x {asked.tasks_per_node} tasks a node are {cpus}, and the "
            f"nodes of {name} have {most_cpus}; give at most {most_cpus // asked.tasks_per_node}"
        )
    for key, value, option in (("Accounts", asked.account, "--account"), ("Qos", asked.qos, "--qos")):
        allowed, denied = partition.allowed.get(f"Allow{key}"), partition.allowed.get(f"Deny{key}", ())
        if value is not None and (value in denied or (allowed is not None and value not in allowed)):
            hint = f"; allowed: {', '.join(allowed)}" if allowed else ""
            return f"{name} does not take {option} {value}{hint}"
    return None


def _check_account(asked: Resources) -> None:
    """Refuse an account that the user has no part in, where the cluster keeps accounts."""
    if asked.account is None:
        return
    user = getpass.getuser()
    known = accounts_of(user)
    accounts = sorted({row[0] for row in known or ()})
    if known is not None and asked.account not in accounts:
        raise ValueError(f"--account {asked.account} is none of {user}'s; accounts: {', '.join(accounts)}")


def _gpus(node: Node, kind: str | None) -> int:
    return sum(node.gpus.values()) if kind is None else node.gpus.get(kind, 0)


def _gpu_words(node: Node) -> Sequence[str]:
    return [f"{kind}:{count}" if kind else str(count) for kind, count in sorted(node.gpus.items())]


def _duration(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock
