"""What is true of a cluster whatever runs on it: the site profile, a small YAML file (imports no torch)."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from data_pipelines.transforms.config import section
from pretrain.config.load import ConfigError, read_yaml

#: Text that fits on a line of a script: no line breaks, no control characters.
Line = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]
#: A path on every node; `~` is the home of who submits.
Place = Annotated[Line, AfterValidator(lambda path: str(Path(path).expanduser()))]
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SCRATCH = re.compile(r"/.*|\$[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z0-9._/-]*)?")


@section
class ContainerSite:
    """An image that Python and everything it needs lie in."""

    image: Place  # a .sif file, or a folder
    runtime: Literal["apptainer", "singularity"] = "apptainer"
    binds: tuple[Line, ...] = ()  # folders of the cluster that are seen inside, as the runtime's --bind takes them
    python: Line = "python"  # the interpreter inside
    gpus: bool = True  # NVIDIA's driver is seen inside (--nv)


@section
class ProbeSite:
    """What a probe job asks for, where it differs from the training job."""

    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    gpus: NonNegativeInt | None = None  # default: 1 where the training job has GPUs
    cpus: PositiveInt | None = None  # default: as many as a task of the training job
    time: Line | int | None = None  # default: 4 hours, or what the partition allows


@section
class Site:
    """A site profile; what the command line says wins over it."""

    partition: Line | None = None  # or several: a,b
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    exclude: Line | None = None  # nodes never to use
    nodes: PositiveInt | None = None
    gpus_per_node: Line | NonNegativeInt | None = None  # a number, or TYPE:NUMBER
    cpus_per_task: PositiveInt | None = None
    memory: Line | NonNegativeInt | None = None  # a node, such as 200G; 0 is all of it
    time: Line | int | None = None
    signal_seconds: PositiveInt | None = None  # how long before the time limit a run is asked to write a checkpoint
    mail: Line | None = None  # an address that SLURM writes to when a job ends or fails
    gpus_by: Literal["gpus-per-node", "gres"] = "gpus-per-node"  # how this site's sbatch is asked for GPUs
    sbatch: dict[str, Line | int | float | bool | None] = Field(default_factory=dict)  # further options of its own
    modules: tuple[Line, ...] = ()  # for `module load`
    venv: Place | None = None  # default: the environment that submits
    container: ContainerSite | None = None
    environment: dict[str, Line | int | float | bool] = Field(default_factory=dict)
    interface: Line | None = None  # of the network between nodes, such as ib0
    scratch: Line | None = None  # a folder of each node's own disk: /local/scratch, or a variable such as $JOBFS
    wandb: Literal["online", "offline", "disabled"] | None = None  # default: offline
    probe: ProbeSite = ProbeSite()
    at: dict[str, dict[str, Any]] = Field(default_factory=dict)  # what differs elsewhere on it, by name

    @model_validator(mode="after")
    def _check(self) -> Site:
        if self.venv is not None and self.container is not None:
            raise ValueError("venv and container both say which Python runs; keep one of them")
        for name in self.environment:
            if not _VARIABLE.fullmatch(name) or name.startswith(("SLURM_", "SBATCH_", "SRUN_")):
                raise ValueError(
                    f"environment names {name!r}; a variable has letters, digits and _ and is none of SLURM's own"
                )
        if self.scratch is not None and not _SCRATCH.fullmatch(self.scratch):
            raise ValueError(
                f"scratch is {self.scratch!r}; give an absolute path, or one variable of the nodes such as $JOBFS"
            )
        return self


def find_site(named: Path | None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The profile to use: the one named, else $SELFSIGHT_SITE, else ~/.config/selfsight/site.yaml if it is there."""
    if named is not None:
        return named.expanduser()
    if environ.get("SELFSIGHT_SITE"):
        return Path(environ["SELFSIGHT_SITE"]).expanduser()
    home = Path(environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "selfsight" / "site.yaml"
    return home if home.is_file() else None


def load_site(path: Path | None, at: str | None = None) -> Site:
    """Read a profile, with what its `at` says of a place over the rest; without one, a site of which nothing is known.

    Raises FileNotFoundError, and ConfigError for keys and values that are not allowed, naming the nearest that are.
    """
    if path is None:
        if at is not None:
            raise ConfigError(f"--at {at}: there is no site profile that could say what {at} is")
        return Site()
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no site profile {path}; `selfsight submit --site-example > {path}` writes one to edit"
        )
    data = read_yaml(path, may_be_empty=True)
    if at is not None:
        places = data.get("at") or {}
        if not isinstance(places, Mapping) or not isinstance(places.get(at), Mapping):
            known = f"those there are: {', '.join(map(str, places))}" if places else "it names none"
            raise ConfigError(f"--at {at}: {path} has no such place under `at`; {known}")
        _check_keys(path, Site, places[at], f"at.{at}.")
        data = {**data, **places[at]}
    for kind, values, prefix in (
        (Site, data, ""),
        (ContainerSite, data.get("container"), "container."),
        (ProbeSite, data.get("probe"), "probe."),
    ):
        if isinstance(values, Mapping):
            _check_keys(path, kind, values, prefix)
    try:
        return TypeAdapter(Site).validate_python(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explained(path, item) for item in error.errors(include_url=False))) from None


def site_example() -> str:
    """A commented profile, to be copied and edited."""
    return files("slurm").joinpath("site.example.yaml").read_text(encoding="utf-8")


def _check_keys(path: Path, kind: type, values: Mapping[Any, Any], prefix: str) -> None:
    known = list(get_type_hints(kind))
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"allowed here: {', '.join(known)}"
            raise ConfigError(f"{path}: unknown key {prefix}{key}; {hint}")


def _explained(path: Path, item: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"] if not str(part).startswith("constrained-"))
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "string_pattern_mismatch":
        message = "must be one line without control characters"
    given = (
        "" if isinstance(item["input"], Mapping) or item["type"] == "value_error" else f" (given: {item['input']!r})"
    )
    return f"{path}: {key}: {message}{given}" if key else f"{path}: {message}"
