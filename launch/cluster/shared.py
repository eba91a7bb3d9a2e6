"""Whether compute nodes can see a path, as far as this machine can tell (imports no torch)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

_MOUNTS = Path("/proc/self/mounts")
#: File systems over a network; those of others are this machine's own.
_NETWORK = re.compile(r"(nfs|lustre|gpfs|beegfs|ceph|cifs|smb|afs|panfs|weka|orangefs|pvfs|9p|gfs2?|ocfs2|fuse\.)")


def local_lines(places: Mapping[str, Path], mounts: Path = _MOUNTS) -> list[str]:
    """A line for each of `places` that lies on a disk of this machine while others lie on shared ones.

    Only a hint, since nodes may have the same at the same place (an environment of the image, say): whether they
    really see it is what the preflight looks at before training.
    """
    kinds = {name: file_system(path, mounts) for name, path in places.items()}
    shared = {name for name, kind in kinds.items() if _NETWORK.match(kind)}
    if not shared:  # one machine, or no way to tell
        return []
    return [
        f"{name} {places[name]} is on a disk of this machine ({kind}), and compute nodes may not see it; "
        f"{', '.join(sorted(shared))} is on a shared one"
        for name, kind in kinds.items()
        if kind and name not in shared
    ]


def file_system(path: Path, mounts: Path = _MOUNTS) -> str:
    """The type of the file system that a path lies on, or will; empty where that can't be found out."""
    try:
        lines = [line.split(" ") for line in mounts.read_text(errors="replace").splitlines()]
    except OSError:
        return ""
    there = path.expanduser().resolve()
    best, kind = -1, ""
    for _, where, what, *_ in lines:
        folder = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), where))
        if there.is_relative_to(folder) and len(folder.parts) >= best:  # the later of two covers the other
            best, kind = len(folder.parts), what
    return kind
