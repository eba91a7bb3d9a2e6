"""From a template of `slurm/` to the batch script of one submission (imports no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launch.cluster.quoting import bash_word, bash_words
from launch.cluster.site import ContainerSite, Site
from slurm import template

SETTINGS, END_OF_SETTINGS = "# --- settings ---", "# --- end of settings ---"
_FIND_MODULE = """\
if ! command -v module >/dev/null; then # a batch script is no login shell
  for init in /etc/profile.d/{lmod,z00_lmod,modules}.sh /usr/share/{lmod/lmod,modules}/init/bash; do
    # shellcheck source=/dev/null
    if [[ -r $init ]]; then source "$init" && break; fi
  done
fi"""


def render(name: str, sbatch_lines: Sequence[str], settings: Sequence[str], written_by: str) -> str:
    """The template `name` with its #SBATCH lines and its settings replaced, its body as it is.

    written_by: the command, as bash words on one line, for whoever reads the script later.
    """
    lines = template(name).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    start, end = lines.index(SETTINGS), lines.index(END_OF_SETTINGS)
    header = [line for line in lines[first:start] if not line.startswith("#SBATCH")]
    about = [f"# Written by: {written_by}", "# shellcheck disable=SC2016 # a user's $ in quotes is meant to stay"]
    return "\n".join(
        [lines[0], *about, *sbatch_lines, *header, SETTINGS, *settings, END_OF_SETTINGS, *lines[end + 1 :], ""]
    )


def settings_of(site: Site, python: str, variables: Mapping[str, str]) -> list[str]:
    """The lines of bash that make a job's environment; `variables` are set besides those of the site."""
    lines = []
    if site.modules:
        lines += [*_FIND_MODULE.splitlines(), f"module load {bash_words(site.modules)} || exit 2"]
    exports = {"SELFSIGHT_PYTHON": python}
    if site.interface is not None:
        exports |= {"NCCL_SOCKET_IFNAME": site.interface, "GLOO_SOCKET_IFNAME": site.interface}
    if site.wandb is not None:
        exports["WANDB_MODE"] = site.wandb
    exports |= {name: _text(value) for name, value in site.environment.items()} | dict(variables)
    lines += [f"export {name}={bash_word(value)}" for name, value in exports.items()]
    if site.venv is not None:
        lines.append(f'export PATH={bash_word(f"{site.venv}/bin")}:"$PATH"')
    if site.scratch is not None:
        lines.append(f"export SLURM_TMPDIR={_scratch(site.scratch)}")
    return lines


def set_arguments(elements: Sequence[Sequence[str]], array: bool) -> list[str]:
    """`set -- ARGUMENTS`: of one job, or by the number of the element of an array."""
    if not array:
        return [f"set -- {bash_words(elements[0])}"]
    cases = [f"  {number}) set -- {bash_words(arguments)} ;;" for number, arguments in enumerate(elements)]
    unknown = '  *) echo "error: this array has no element $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;'
    return ["case ${SLURM_ARRAY_TASK_ID:-none} in", *cases, unknown, "esac"]


def container_python(container: ContainerSite) -> str:
    """A script that is Python inside the container. It becomes the container's process: signals reach Python itself."""
    options = ["--nv"] * container.gpus + [part for bind in container.binds for part in ("--bind", bind)]
    command = bash_words([container.runtime, "exec", *options, container.image, container.python])
    return f'#!/bin/bash\nexec {command} "$@"\n'


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _scratch(place: str) -> str:
    """A path, or a variable that is looked up on the node; the job fails where it is not set."""
    if not place.startswith("$"):
        return bash_word(place)
    name, slash, rest = place[1:].partition("/")
    return f'"${{{name}:?the site profile names it as scratch, and this node has no such variable}}{slash}{rest}"'
