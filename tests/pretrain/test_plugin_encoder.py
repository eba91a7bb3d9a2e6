"""A family of encoders that another distribution registers: the README's example, from its entry point to a probe."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import config_data

import pretrain.encoders
from pretrain.encoders.registry import FAMILIES
from pretrain.encoders.spec import EncoderSpec
from pretrain.encoders.supported import COLUMNS

README = Path(pretrain.encoders.__file__).with_name("README.md")


def install(site: Path, name: str, points: dict[str, str]) -> None:
    """What pip leaves of a distribution: its dist-info with entry points."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = "".join(f"{point} = {value}\n" for point, value in points.items())
    (info / "entry_points.txt").write_text(f"[selfsight.encoders]\n{lines}", encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The example that the README shows, installed."""
    config, encoder = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "site" / "tiny_mixer").mkdir(parents=True)
    for file, text in (("__init__.py", ""), ("config.py", config), ("encoder.py", encoder)):
        (tmp_path / "site" / "tiny_mixer" / file).write_text(text, encoding="utf-8")
    install(tmp_path / "site", "tiny_mixer", {"tiny_mixer": "tiny_mixer.config:SPEC"})
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
import tiny_mixer.config  # first: a plug-in may be imported before any of ours
assert "torch" not in sys.modules
from pretrain.config.load import load_config
config = load_config(sys.argv[1])
assert "torch" not in sys.modules
assert type(config.encoder) is tiny_mixer.config.TinyMixerConfig, config.encoder
from pretrain.config.load import dump_config, parse_config
import yaml
assert parse_config(yaml.safe_load(dump_config(config))) == config
import torch
from pretrain.run import pretrain
run = pretrain(config)
from pretrain.encoders.load import load_any
from pretrain.interop.export import export_encoder
exported = export_encoder(run / "encoder", Path(sys.argv[2]), "safetensors")
assert exported.difference <= exported.tolerance
encoder = load_any(sys.argv[2]).encoder
ours = load_any(str(run)).encoder
images = torch.randn(2, 3, 32, 32)
assert torch.equal(encoder(images).pooled, ours(images).pooled)
from launch.cli import main
for command in (f"probe {run} --data {sys.argv[3]} --epochs 1 --seeds 1 --device cpu", "encoders"):
    try:
        main(command.split())
    except SystemExit as ended:
        assert not ended.code, ended.code
"""


@pytest.mark.parametrize("method", ["mim", pytest.param("dino", marks=pytest.mark.slow)])
def test_the_documented_example_trains_and_is_probed(method: str, site: Path, shards: Path, tmp_path: Path) -> None:
    data = config_data(method, "vit", shards, tmp_path / "runs", train={"steps": 2})
    data |= {"encoder": {"family": "tiny_mixer", "dim": 16, "patch": 4}, "checkpoint": {"every_steps": 2}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    for split, shard in zip(("train", "val"), sorted(shards.glob("train-*.tar")), strict=True):
        shutil.copy(shard, labelled / f"{split}-000000.tar")
    done = python(site, WHOLE_WAY, str(tmp_path / "run.yaml"), str(tmp_path / "out.safetensors"), str(labelled))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pretrained" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("| `tiny_mixer` |"))
    cells = dict(zip(COLUMNS, row.strip("| ").split(" | ")[1:], strict=True))
    assert cells["mae"] == "takes whole images only"
    assert (cells["mim"], cells["dino"], cells["probe"]) == ("yes", "yes", "yes")


def refused(site: Path, family: str) -> str:
    code = (
        "import sys\nfrom pretrain.config.load import load_config, ConfigError\n"
        "try: load_config('mae_vit_cifar_cpu', ['data.train=x', f'encoder.family={sys.argv[1]}'])\n"
        "except ConfigError as error: print(error)\n"
        "else: print('taken')"
    )
    done = python(site, code, family)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr + done.stdout
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "ModuleNotFoundError: No module named 'broken'"),
        ("raise RuntimeError('a GPU is needed')", "RuntimeError: a GPU is needed"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("x = 1", "AttributeError: module 'broken' has no attribute 'SPEC'"),
        ("SPEC = 1", "is no EncoderSpec of the name 'broken'"),
        (
            "from pretrain.encoders.spec import EncoderSpec\nSPEC = EncoderSpec('broken', '', '', dict, 'a:b', 'any')",
            "needs family: Literal['broken']",
        ),
    ],
)
def test_a_broken_plug_in_is_left_out_and_named_in_one_line(module: str | None, reason: str, site: Path) -> None:
    if module is not None:
        (site / "broken.py").write_text(module, encoding="utf-8")
    install(site, "some_lab", {"broken": "broken:SPEC"})
    told = refused(site, "broken")
    assert len(told.splitlines()) == 1
    assert "'broken' of some_lab is left out" in told
    assert reason in told
    assert refused(site, "swin") != told  # the rest is there


def test_a_name_that_is_taken_is_refused(site: Path) -> None:
    install(site, "other", {"vit": "tiny_mixer.config:SPEC", "tiny_mixer": "tiny_mixer.encoder:SPEC"})
    code = (
        "from pretrain.encoders.registry import FAMILIES, LEFT_OUT\n"
        "from pretrain.encoders.vit.config import VitConfig\n"
        "assert FAMILIES['vit'].config is VitConfig\nprint(LEFT_OUT['vit'])"
    )
    done = python(site, code)
    assert done.returncode == 0, done.stderr
    assert "'vit' of other is left out: ValueError: the name is already taken" in done.stdout


def test_each_family_of_ours_is_told_whole() -> None:
    from pkgutil import resolve_name

    for name, spec in FAMILIES.items():
        assert isinstance(spec, EncoderSpec)
        assert spec.name == name
        assert resolve_name(spec.build).__module__ == f"pretrain.encoders.{name}.encoder"
        for layout in spec.layouts.values():
            assert callable(resolve_name(layout.read))
        assert (README.parent / name / "README.md").is_file()
