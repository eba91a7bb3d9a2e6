"""What an encoder is worth, into wandb: beside the training it came from, or as a run of its own."""

from __future__ import annotations

import json
import secrets
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.config.load import ConfigError, load_config
from pretrain.tracking.console import say
from pretrain.tracking.wandb_identity import Identity, identity_of, stored_identity, wandb_mode
from pretrain.tracking.wandb_run import PROBES, WandbRun, picture_key


@dataclass(frozen=True)
class Accuracy:
    """A share of 0 .. 1 with its standard error."""

    share: float
    error: float


#: Names of columns, and rows of plain values.
Table = tuple[Sequence[str], Sequence[Sequence[Any]]]


def log_probe(
    run: Path,
    step: int | None,
    scores: Mapping[str, Accuracy],
    tables: Mapping[str, Table] | None = None,
    pictures: Sequence[Path] = (),
) -> None:
    """Add the scores of a checkpoint of `step` to a training's wandb run, if it has one, with error bars; and what
    belongs to them: tables as of `log_tables`, and pictures of the run, saved as NAME-STEP.png.

    The row has `probe/NAME` with `_low`, `_high` and `_error`, at `probe/step`. It is kept in `probes.jsonl`, too, from
    which wandb gets it later if it is lost on the way. Configuration and summary stay the training's.
    """
    _add(run, [probe_row(step, scores), *([_table_row(step, tables)] if tables else [])], pictures)


def _add(run: Path, rows: Sequence[dict[str, Any]], pictures: Sequence[Path] = ()) -> None:
    stored = stored_identity(run)
    if "id" not in stored or "mode" not in stored:
        return
    try:
        identity = identity_of(run, load_config(run / "config.yaml"))
    except (ConfigError, OSError):  # of another version: the row matters more than the rest
        identity = Identity(run, stored["mode"], stored["id"], stored.get("project", "selfsight"), stored.get("entity"))
    if identity.mode == "online" and not (run / "encoder").is_dir():
        # a server takes rows of one process at a time, and the training may be under way
        identity = replace(identity, mode="offline")
        say("the training has not ended: `selfsight dashboard RUN --sync` sends its probe when it has")
    try:
        with (run / PROBES).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        say(f"{run / PROBES} can't be written ({error.strerror}); if wandb loses the probe, it is in eval/ only")
    tracked = WandbRun(identity, catch_up=False)
    for row in (*rows, *({"step": int(path.stem[-8:]), picture_key(path): path} for path in pictures)):
        tracked.row(row)
    tracked.finish()


def log_tables(run: Path, step: int | None, tables: Mapping[str, Table]) -> None:
    """Add tables to a training's wandb run, if it has one, as `tables/NAME`; kept in `probes.jsonl` as probes are, and
    sent from there if they are lost."""
    _add(run, [_table_row(step, tables)])


def _table_row(step: int | None, tables: Mapping[str, Table]) -> dict[str, Any]:
    content = {
        f"tables/{name}": {"columns": list(columns), "data": list(map(list, rows))}
        for name, (columns, rows) in tables.items()
    }
    digest = zlib.crc32(json.dumps(content, sort_keys=True).encode())  # which tables of a step these are
    return {"probe/step": step or 0, "probe/tables": float(digest), **content}


def log_lone_probe(
    folder: Path, name: str, scores: Mapping[str, Accuracy], about: Mapping[str, Any], project: str, group: str | None
) -> None:
    """The same for an encoder that no training here made (timm's, an imported one): a wandb run of its own, of job
    type `probe`; wandb's files go to `folder`."""
    identity = Identity(
        folder, wandb_mode("auto"), secrets.token_hex(4), project, name=name, group=group, job_type="probe",
        config=about, kept=False,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    tracked = WandbRun(identity, catch_up=False)
    tracked.row(probe_row(None, scores))
    tracked.finish()


def probe_row(step: int | None, scores: Mapping[str, Accuracy]) -> dict[str, float]:
    """The numbers of a probe under their names in wandb; error bars are of one standard error."""
    row: dict[str, float] = {"probe/step": step or 0}
    for name, accuracy in scores.items():
        row |= {
            f"probe/{name}": accuracy.share,
            f"probe/{name}_low": accuracy.share - accuracy.error,
            f"probe/{name}_high": accuracy.share + accuracy.error,
            f"probe/{name}_error": accuracy.error,
        }
    return row
