"""Which wandb run a training has: `wandb.json` in its folder, and how it is tracked."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.files import write_text
from pretrain.config import Config
from pretrain.config.load import as_shown, dump_config
from pretrain.description import describe, own_words
from pretrain.tracking.console import say

FILE = "wandb.json"


@dataclass(frozen=True)
class Identity:
    """Which run of wandb's, in which folder of ours.

    mode: online, offline or disabled. kept: whether the folder is that of a run, whose `wandb.json` tells the id.
    """

    folder: Path
    mode: str
    id: str = ""
    project: str = "selfsight"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    tags: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    kept: bool = True


def identity_of(folder: Path, config: Config, keep: bool = True) -> Identity:
    """The wandb run of a training: the one whose id is in `wandb.json`, or a new id, which is kept there."""
    tracking = config.tracking
    mode = wandb_mode(tracking.wandb)
    if mode == "disabled":
        return Identity(folder, mode)
    identity = Identity(
        folder=folder,
        mode=mode,
        id=str(stored_identity(folder).get("id") or secrets.token_hex(4)),
        project=tracking.project,
        entity=tracking.entity,
        name=config.name,
        group=tracking.group,
        job_type=tracking.job_type,
        notes=tracking.notes or ". ".join(filter(None, (own_words(config), describe(config)))),
        tags=tracking.tags,
        config={"yaml": dump_config(config)} | as_shown(config),
        kept=keep,
    )
    keep_identity(identity)
    return identity


def stored_identity(folder: Path) -> dict[str, Any]:
    """What `wandb.json` says of a run: id, project, entity, mode, url; nothing where there is none."""
    try:
        stored = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def wandb_mode(wanted: str) -> str:
    """`auto` is online for a user who is logged in and offline otherwise; WANDB_MODE, if set, decides."""
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    import netrc

    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return "offline"
    return "online" if any("wandb" in host for host in hosts) else "offline"


def keep_identity(identity: Identity, url: str | None = None) -> None:
    """Write `wandb.json` of a run, if this is one; an earlier `url` stays."""
    if not identity.kept:
        return
    before = stored_identity(identity.folder)
    stored = {
        "id": identity.id,
        "project": identity.project,
        "entity": identity.entity,
        "mode": identity.mode,
        "url": url or before.get("url"),
    }
    if stored == before:
        return
    try:
        write_text(identity.folder / FILE, json.dumps(stored) + "\n")
    except OSError as error:
        say(f"{identity.folder / FILE} can't be written ({error.strerror}); a later start may begin another wandb run")
