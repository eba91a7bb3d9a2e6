"""What wandb refuses is refused with the settings, before a run loses its metrics."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pretrain.config.sections import TrackingConfig
from pretrain.config.wandb_names import check_name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"project": "team/project"}, "leave out / .*tracking.entity"),
        ({"project": "what?"}, "wandb allows none of"),
        ({"project": "100%"}, "leave out %"),
        ({"project": "a" * 129}, "of 129 characters; wandb takes 1 to 128"),
        ({"project": ""}, "not blank"),
        ({"group": "g" * 129}, "group holds .* of 129 characters"),
        ({"job_type": "j" * 65}, "job_type holds .* of 65 characters; wandb takes 1 to 64"),
        ({"tags": ("fine", "t" * 65)}, "tags holds .* of 65 characters"),
        ({"tags": ("fine", "")}, "tags holds '' *; wandb"),
        ({"tags": ("a", "a")}, "repeat one"),
        ({"entity": "a\nb"}, "printable"),
    ],
)
def test_names_that_wandb_refuses_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrackingConfig(**settings)


def test_names_at_their_limits_pass() -> None:
    TrackingConfig(project="p" * 128, group="g" * 128, job_type="j" * 64, tags=("t" * 64, "zwei Worte"), entity="team")
    check_name("n" * 128)
    with pytest.raises(ValueError, match="129 characters"):
        check_name("n" * 129)
