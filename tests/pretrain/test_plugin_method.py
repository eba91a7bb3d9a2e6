"""A method that another distribution registers: the README's example, from its entry point to a resumed run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import config_data

import pretrain.methods

README = Path(pretrain.methods.__file__).with_name("README.md")


def install(site: Path, name: str, points: dict[str, str]) -> None:
    """What pip leaves of a distribution: its dist-info with entry points."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = "".join(f"{point} = {value}\n" for point, value in points.items())
    (info / "entry_points.txt").write_text(f"[selfsight.methods]\n{lines}", encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The example that the README shows, installed."""
    config, method = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "site" / "rotation").mkdir(parents=True)
    for file, text in (("__init__.py", ""), ("config.py", config), ("method.py", method)):
        (tmp_path / "site" / "rotation" / file).write_text(text, encoding="utf-8")
    install(tmp_path / "site", "rotation", {"rotation": "rotation.config:SPEC"})
    return tmp_path / "site"


def python(site: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip


WHOLE_WAY = """
import sys
from pathlib import Path
from pretrain.config.load import dump_config, load_config, parse_config
config = load_config(sys.argv[1])
assert "torch" not in sys.modules
import yaml
assert parse_config(yaml.safe_load(dump_config(config))) == config
from pretrain.run import pretrain
run = pretrain(config)
from pretrain.encoders.load import load_any
load_any(str(run))
from launch.known_metrics import known_as
assert known_as("turns_right").title == "turns told right"
"""


def test_the_documented_example_trains_and_leaves_an_encoder(site: Path, shards: Path, tmp_path: Path) -> None:
    data = config_data("mim", "vit", shards, tmp_path / "runs", train={"steps": 2, "batch_size": 8})
    data |= {"method": {"name": "rotation"}, "checkpoint": {"every_steps": 1}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    done = python(site, WHOLE_WAY, str(tmp_path / "run.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]


def refused(site: Path, name: str) -> str:
    code = (
        "import sys\nfrom pretrain.config.load import load_config, ConfigError\n"
        "try: load_config('mae_vit_cifar_cpu', ['data.train=x', f'method.name={sys.argv[1]}'])\n"
        "except ConfigError as error: print(error)\n"
        "else: print('taken')"
    )
    done = python(site, code, name)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr + done.stdout
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "No module named 'broken'"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("SPEC = 1", "is no MethodSpec"),
    ],
)
def test_a_broken_plug_in_is_named_in_one_line(module: str | None, reason: str, site: Path) -> None:
    if module is not None:
        (site / "broken.py").write_text(module, encoding="utf-8")
    install(site, "some_lab", {"broken": "broken:SPEC"})
    told = refused(site, "broken")
    assert "'broken' of some_lab is left out" in told
    assert reason in told


def test_a_name_that_is_taken_stays_ours(site: Path) -> None:
    install(site, "other", {"mae": "rotation.config:SPEC"})
    code = "from pretrain.methods.registry import METHODS, LEFT_OUT; print(METHODS['mae'].build); print(LEFT_OUT)"
    done = python(site, code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("pretrain.methods.mae.method:build")
