"""What of the extra `detection` is installed."""

from __future__ import annotations

from importlib.util import find_spec


def check_packages(what: str, *names: str) -> None:
    """Raises ValueError, naming the command, where one of the packages that `what` needs is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{what} needs {', '.join(missing)}, which this installation lacks: pip install 'selfsight[detection]' "
            "(--constraint constraints.txt '.[detection]' in the checkout)"
        )
