"""Any other option of sbatch: passed on as it is, unless it is one that we set ourselves (imports no torch)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from launch.cluster.quoting import sbatch_line
from pretrain.config.load import ConfigError

#: Options that are ours, and how to say what they say.
OWN = {
    "account": "--account", "array": "--array KEY=V1,V2", "chdir": "the folder you submit from",
    "constraint": "--constraint", "cpus-per-gpu": "--cpus-per-task", "cpus-per-task": "--cpus-per-task",
    "dependency": "submit again when the other job is over", "error": "", "exclude": "--exclude",
    "export": "`environment` of the site profile", "gpus": "--gpus-per-node", "gpus-per-node": "--gpus-per-node",
    "gpus-per-task": "--gpus-per-node: a rank takes the GPU of its local rank, and has to see them all",
    "gres": "--gpus-per-node, with `gpus_by: gres` in the site profile", "job-name": "--name", "mail-type": "",
    "mail-user": "`mail` of the site profile", "mem": "--memory", "nodes": "--nodes", "no-requeue": "--max-failures 0",
    "ntasks": "--nodes and --gpus-per-node", "ntasks-per-gpu": "--gpus-per-node",
    "ntasks-per-node": "--tasks-per-node", "open-mode": "", "output": "", "parsable": "", "partition": "--partition",
    "qos": "--qos", "requeue": "", "signal": "--signal-seconds", "test-only": "--dry-run", "time": "--time", "wrap": "",
}  # fmt: skip
_NAME = re.compile(r"[a-z][a-z0-9-]*")


def passed_through(
    typed: Sequence[str], of_site: Mapping[str, str | int | float | bool | None]
) -> tuple[tuple[str, str | None], ...]:
    """Options and values: those of the site profile (`true` or null: an option without a value, `false`: none), and
    over them those typed as `NAME=VALUE` or `NAME`.

    Raises ConfigError for one that we own, naming what to use; for a name that is none; for one that is typed twice.
    """
    found: dict[str, str | None] = {}
    for name, given in of_site.items():
        if given is not False:
            found[_checked(name, "`sbatch` of the site profile")] = None if given in (True, None) else str(given)
    seen = set()
    for text in typed:
        name, equals, value = text.removeprefix("--").partition("=")
        name = _checked(name, f"--sbatch {text}")
        if name in seen:
            raise ConfigError(f"--sbatch names {name} twice; keep one")
        seen.add(name)
        found[name] = value if equals else None
    for option, of_it in found.items():
        sbatch_line(option, of_it)  # refuses what a line can't hold
    return tuple(found.items())


def _checked(name: str, where: str) -> str:
    name = name.removeprefix("--")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: {name!r} is no option; write it as sbatch has it, such as reservation=NAME")
    if name in OWN:
        instead = f"; instead: {OWN[name]}" if OWN[name] else ""
        raise ConfigError(f"{where}: {name} is set by selfsight itself{instead}")
    return name
