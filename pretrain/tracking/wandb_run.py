"""One wandb run for all of a training: over its requeues, its probes, and what kills wandb meanwhile.

All rows carry `step`, and wandb's charts have it as their axis; wandb's own count of rows means nothing, so rows may
come in any order and from several processes. A resumed training first sends what wandb lacks of `metrics.jsonl`, for
wandb's service writes to the disk only now and then, and loses the rest when it is killed.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain.tracking.console import say
from pretrain.tracking.metrics_log import read_lines, read_rows
from pretrain.tracking.wandb_files import Had, key_of, kind_of, what_wandb_has
from pretrain.tracking.wandb_identity import Identity, keep_identity

PROBES = "probes.jsonl"  # rows of probes, as wandb gets them
FINISH_SECONDS = 20.0
INIT_SECONDS = 20
MOST_WAITING = 10_000  # rows that wandb has not taken yet
ALERT = "_alert"
TRIES = 3  # to open the run, when wandb's service dies


class WandbRun:
    """A wandb run that may be absent, lost or slow without its caller noticing: a thread makes all calls."""

    def __init__(self, identity: Identity, start_step: int = 0, catch_up: bool = True) -> None:
        """Begin or continue a run; with `catch_up`, send what it lacks of the folder's files up to `start_step`."""
        self.identity, self._sent_to, self._catch_up = identity, start_step, catch_up
        self.num_caught_up = 0  # rows of the folder's files that wandb lacked
        self._interrupted: dict[str, Any] | None = None  # the row at which wandb's service died
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_WAITING)
        self._lost = identity.mode == "disabled"
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        if not self._lost:
            self._thread.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send a row, some time soon; at most one of its kind for a step."""
        self._put({"step": step, **values})

    def row(self, values: Mapping[str, Any]) -> None:
        """Send a row that brings its own axis."""
        self._put(dict(values))

    def picture(self, step: int, path: Path, caption: str = "") -> None:
        """Send a picture that has been saved as NAME-STEP.png."""
        self._put({"step": step, picture_key(path): path, "caption": caption})

    def alert(self, title: str, text: str) -> None:
        """Tell those who watch the run, by wandb's own ways."""
        self._put({ALERT: (title, text)})

    def finish(self, seconds: float | None = None) -> None:
        """Wait until all is written or sent, but not for ever: `seconds`, or else FINISH_SECONDS."""
        if not self._thread.is_alive():
            return
        seconds = FINISH_SECONDS if seconds is None else seconds
        self._put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            say(f"wandb did not finish within {seconds:g} s; {self._advice()}")
            self._lost = True
            _end_own_service()  # or wandb would wait for it when this process exits, for ever
            self._thread.join(5)

    def _put(self, row: dict[str, Any] | None) -> None:
        if self._lost:
            return
        try:
            self._waiting.put_nowait(row)
        except queue.Full:
            self._lost = True
            say(f"wandb has taken none of the last {MOST_WAITING:,} rows and gets no more; {self._advice()}")

    def _advice(self) -> str:
        return (
            f"what it lacks is in {self.identity.folder}, and is sent by the next start of the run or by "
            "`selfsight dashboard RUN --sync`"
        )

    def _work(self) -> None:
        """Of the thread: open the run, catch up, send rows; once more if wandb's service dies."""
        for _ in range(TRIES):
            opened = open_wandb(self.identity, given_up=lambda: self._lost)
            if self._lost:  # nobody waits for it any more
                return
            if opened is None:
                break
            try:
                had = self._begin(opened)
                while (row := self._waiting.get()) is not None:
                    self._interrupted, self._sent_to = row, max(self._sent_to, int(row.get("step", 0)))
                    _send(opened, row, had)
                    self._interrupted = None
                opened.finish()
                _leave_service()  # our own ends only after it has written all, which finish does not wait for
                return
            except Exception as error:  # wandb raises many kinds when its service is gone; none may end a training
                if self._lost:  # nobody waits for it any more
                    _forget_service()
                    return
                say(f"wandb is lost ({type(error).__name__}: {error})")
                _forget_service()
        self._lost = True
        say(f"wandb gets no more rows; {self._advice()}")

    def _begin(self, opened: Any) -> Had:
        """Send what earlier lives of the run have written down but wandb lacks."""
        identity = self.identity
        had = what_wandb_has(identity.folder, identity.id, identity.project)
        if opened.resumed:  # only a server says so
            step = opened.summary.get("step")
            had.all_to = int(step) if isinstance(step, int | float) else 0
        elif had.summary:  # each file's summary replaces the last's when it is sent
            opened.summary.update(had.summary)
        if self._catch_up:
            for row in missing_rows(identity.folder, had, self._sent_to):
                _send(opened, row, had)
                self.num_caught_up += 1
        if self._interrupted is not None:
            _send(opened, self._interrupted, had)
        return had


def missing_rows(folder: Path, had: Had, up_to: float = float("inf")) -> list[dict[str, Any]]:
    """What of a run's files wandb lacks, up to a step: metrics, the machines, pictures; and probes, of any step."""
    rows = [*read_rows(folder / "metrics.jsonl", up_to), *read_rows(folder / "system.jsonl", up_to)]
    for path in sorted((folder / "pictures").glob("*-????????.png")):
        if int(path.stem[-8:]) <= up_to:
            rows.append({"step": int(path.stem[-8:]), picture_key(path): path})
    rows += read_lines(folder / PROBES)
    return [row for row in rows if (key := key_of(row)) is not None and not had.has(*key)]


def picture_key(path: Path) -> str:
    """The name in wandb of a picture saved as NAME-STEP.png."""
    return f"pictures/{path.stem.rpartition('-')[0]}"


def open_wandb(identity: Identity, given_up: Callable[[], bool] = lambda: False) -> Any:
    """A wandb run, offline if the server can't be reached in time; None when even that fails, or nobody waits for it.

    Of the machine and the command line wandb is told nothing: paths and URLs there may hold secrets.
    """
    attempts = [identity.mode, "offline"]
    if os.environ.get("WANDB_SERVICE"):  # of the batch script; it may be gone
        attempts.insert(0, identity.mode)
    for mode in attempts:
        try:
            run = _init(identity, mode)
        except Exception as error:  # of many kinds; a broken dashboard is no reason not to train
            if given_up():  # its service was killed: another would only be in the way of the end
                return None
            say(f"wandb can't start {mode} ({type(error).__name__}: {error})")
            _forget_service()
        else:
            _announce(identity, mode, run)
            return run
    return None


def _init(identity: Identity, mode: str) -> Any:
    import wandb

    return wandb.init(
        dir=str(identity.folder),
        mode=mode,  # type: ignore[arg-type]
        id=identity.id,
        resume="allow",
        project=identity.project,
        entity=identity.entity,
        name=identity.name,
        group=identity.group,
        job_type=identity.job_type,
        notes=identity.notes,
        tags=list(identity.tags) or None,
        config=dict(identity.config),
        settings=wandb.Settings(
            console="off",
            silent=True,
            reinit="create_new",
            init_timeout=INIT_SECONDS,
            disable_git=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_stats=True,  # ours are of all nodes
        ),
    )


def _announce(identity: Identity, mode: str, run: Any) -> None:
    """Say once where the run is to be seen."""
    url = run.url if mode == "online" else None
    if url:
        say(f"wandb: online, project {identity.project}{f' of {run.entity}' if run.entity else ''}: {url}")
    else:
        say(
            f"wandb: offline, project {identity.project}; `selfsight dashboard {identity.folder} --sync` sends it from "
            "where there is a network, tracking.wandb=disabled leaves it out"
        )
    keep_identity(replace(identity, mode=mode), url)


def _send(run: Any, row: dict[str, Any], had: Had) -> None:
    """One row, unless wandb has it."""
    if ALERT in row:
        title, text = row[ALERT]
        run.alert(title=title, text=text, level="WARN", wait_duration=0)
        return
    kind = kind_of(row)
    key = key_of(row)
    if key is not None and not had.add(*key):
        return
    axis = "step" if "step" in row else "probe/step"
    for name in {name for name in row if not name.startswith("tables/")} - had.named - {axis, "caption"}:
        run.define_metric(name, step_metric=axis)  # each by its name: which of two patterns counts, nobody says
        had.named.add(name)
    if kind.startswith("pictures/"):
        import wandb

        path = row[kind]
        if not path.exists():
            return
        row = {"step": row["step"], kind: wandb.Image(str(path), caption=row.get("caption") or None)}
    run.log({name: _table_of(value) if name.startswith("tables/") else value for name, value in row.items()})


def _table_of(value: Mapping[str, Any]) -> Any:
    import wandb

    return wandb.Table(columns=value["columns"], data=value["data"], allow_mixed_types=True)


def _leave_service() -> None:
    """End wandb's service if this process has started it, and else only say goodbye."""
    with suppress(Exception):  # it may be dead
        import wandb

        wandb.teardown()


def _forget_service() -> None:
    """Let go of a service that has died or is of no use, so that the next call starts one."""
    _leave_service()
    os.environ.pop("WANDB_SERVICE", None)


def _end_own_service() -> None:
    """Kill the service that this process has started, if it has."""
    import psutil

    for process in psutil.Process().children():
        if process.name().startswith("wandb-core"):
            process.kill()
