"""What wandb takes as names; it refuses others only when a run has begun, whose metrics it then loses."""

from __future__ import annotations

from collections.abc import Sequence

#: Characters of a run's name, a project or a group.
MOST_NAME = 128
#: Characters of a tag or a job type.
MOST_TAG = 64
FORBIDDEN = "/\\#?%:"  # in a project's name, as it stands in URLs


def check_name(name: str) -> None:
    """Raise ValueError for the name of a run that is too long to be one of wandb's."""
    if len(name) > MOST_NAME:
        raise ValueError(f"name is {name!r} of {len(name)} characters; wandb takes 1 to {MOST_NAME}")


def check_wandb_names(project: str, entity: str | None, group: str | None, job_type: str, tags: Sequence[str]) -> None:
    """Raise ValueError for the first that wandb would refuse, naming the value and what is allowed."""
    found = sorted({character for character in project if character in FORBIDDEN})
    if found:
        raise ValueError(
            f"project is {project!r}; wandb allows none of {' '.join(FORBIDDEN)} in it: leave out {' '.join(found)}"
            + (" (the user or team before a slash is tracking.entity)" if "/" in found else "")
        )
    for name, value, most in (
        ("project", project, MOST_NAME),
        ("entity", entity, MOST_NAME),
        ("group", group, MOST_NAME),
        ("job_type", job_type, MOST_TAG),
        *(("tags", tag, MOST_TAG) for tag in tags),
    ):
        if value is None:
            continue
        if not value.strip() or not value.isprintable():
            raise ValueError(f"{name} holds {value!r}; wandb takes printable text that is not blank")
        if len(value) > most:
            raise ValueError(f"{name} holds {value!r} of {len(value)} characters; wandb takes 1 to {most}")
    if len(set(tags)) < len(tags):
        raise ValueError(f"tags {list(tags)} repeat one; name each once")
