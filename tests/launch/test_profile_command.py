"""`selfsight data profile` on a preset of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny import config_data, write_shards

from launch.cli import main


@pytest.mark.parametrize("as_json", [True, False])
def test_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    write_shards(tmp_path, 40)
    preset = tmp_path / "preset.yaml"
    preset.write_text(yaml.safe_dump(config_data("mae", "vit", tmp_path, tmp_path / "runs")))
    arguments = ["data", "profile", str(preset), "--seconds", "1", "--gpu-rate", "2000"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"] if as_json else arguments)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    if as_json:
        found = json.loads(shown)
        assert found["cores_needed"] >= 1
        assert found["images_per_second"]["one_thread"] > 0
        assert sum(found["milliseconds_per_image"].values()) > 0
    else:
        assert "header and draw" in shown
        assert "2,000 images/s need" in shown
    assert not (tmp_path / "runs").exists()
