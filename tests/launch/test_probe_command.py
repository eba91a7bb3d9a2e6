"""What `selfsight probe` hands on: the options of earlier versions go on meaning what they meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from making import encode, picture, write_tar
from typer.testing import CliRunner

from data_pipelines.packing.grouping import NO_GROUPS
from launch import probe_command
from launch.probe_command import refuse_early


@pytest.mark.parametrize(
    ("options", "also", "full"),
    [
        ([], [], False),
        (["--also", "nearest"], ["nearest"], False),
        (["--logistic"], ["logistic"], False),
        (["--logistic", "--full"], ["logistic"], True),
        (["--full"], ["logistic"], True),  # alone it was enough
        (["--also", "nearest", "--full"], ["nearest"], True),
        (["--also", "nearest", "--logistic"], ["nearest", "logistic"], False),
    ],
)
def test_the_probes_that_options_name(
    monkeypatch: pytest.MonkeyPatch, options: list[str], also: list[str], full: bool
) -> None:
    asked: dict = {}
    monkeypatch.setattr(probe_command, "refuse_early", lambda *_: None)
    monkeypatch.setattr("eval.probe.run_probe", lambda target, **more: asked.update(more))
    monkeypatch.setattr("eval.report.probe_table", lambda results: "")
    monkeypatch.setattr("launch.report.page.refresh", lambda target: None)
    app = typer.Typer()
    app.command()(probe_command.probe)
    result = CliRunner().invoke(app, ["runs/x", "--data", "shards", "--group-by", "patient", *options])
    assert result.exit_code == 0, result.output
    assert (asked["also"], asked["full"], asked["group_by"]) == (also, full, "patient")


def test_data_without_masks_are_refused_before_features_are_computed(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", [(f"{n}.png", encode(picture(n))) for n in range(3)])
    with pytest.raises(ValueError, match=r"no image of train in .* has a mask, .* --masks FOLDER"):
        refuse_early("timm:vit_tiny_patch16_224", str(tmp_path), NO_GROUPS, ["segmentation"])
    assert refuse_early("timm:vit_tiny_patch16_224", str(tmp_path), NO_GROUPS, ["linear"]) == str(tmp_path)
