"""The house rules: names, who may import whom, what must stay light, what is shipped."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from pretrain.config.load import list_presets
from pretrain.encoders.registry import FAMILIES

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_pipelines", "eval", "launch", "pretrain", "slurm")
#: What of the other packages a package may import; `launch` may import all.
MAY_IMPORT = {
    "data_pipelines": (),
    "pretrain": ("data_pipelines", "eval.label_free", "eval.probes.few_shot", "eval.probes.knn", "eval.statistics"),
    "eval": (
        "data_pipelines",
        "pretrain.encoder_folder",
        "pretrain.encoders",
        "pretrain.config",
        "pretrain.text",
        "pretrain.tracking",
    ),
    "slurm": (),
}
HEAVY = ("torch", "torchvision", "timm", "deepspeed", "wandb", "matplotlib", "sklearn", "webdataset")
LIGHT_MODULES = (
    "eval.registry",
    "eval.report",
    "launch.cli",
    "launch.cluster.cancel",
    "launch.cluster.checks",
    "launch.cluster.preflight",
    "launch.cluster.status",
    "launch.cluster.submit",
    "launch.demo",
    "launch.follow_command",
    "launch.local",
    "launch.ranks",
    "launch.pretrain_command",
    "pretrain.checkpoints.folder",
    "pretrain.config.load",
    "pretrain.encoders.registry",
    "pretrain.encoder_folder",
    "pretrain.engines.schedules",
    "pretrain.survival.startup",
    "pretrain.survival.stopping",
    "pretrain.survival.watchdog",
    "slurm",
)


def modules(package: str) -> Iterator[Path]:
    return (ROOT / package).rglob("*.py")


def our_imports(path: Path) -> Iterator[str]:
    """Every module of our packages that a file imports, at any depth of the code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] in PACKAGES)


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_name_resolves_to_this_checkout(package: str) -> None:
    found = importlib.import_module(package).__file__
    assert found is not None
    assert Path(found).parent == ROOT / package


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        for name in our_imports(path)
        if not within(name, (package, *MAY_IMPORT[package]))
        and not (path.name == "__main__.py" and within(name, ("launch.cli",)))
    ]
    assert not wrong


def test_only_a_family_knows_its_settings() -> None:
    """What others ask of a family, they ask its specification: adding one touches its own folder."""
    sections = [spec.config.__name__ for spec in FAMILIES.values() if spec.name != "timm"]  # whose names others take
    names = re.compile(rf"\b({'|'.join(sections)})\b")
    wrong = [
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in modules(package)
        if path.parents[1] != ROOT / "pretrain" / "encoders" and names.search(path.read_text(encoding="utf-8"))
    ]
    assert not wrong


def test_what_is_measured_online_stands_alone() -> None:
    """Training calls it, so it may pull in nothing of eval's but what a probe and its numbers are."""
    light = ("eval.base", "eval.scores", "eval.outcomes", "eval.statistics", "data_pipelines.files")
    for path in (
        "probes/knn.py",
        "probes/few_shot.py",
        "label_free.py",
        "outcomes.py",
        "statistics.py",
        "scores.py",
        "base.py",
    ):
        assert all(within(name, light) for name in our_imports(ROOT / "eval" / path)), path
    assert not [name for file in ("base", "scores") for name in our_imports(ROOT / "eval" / f"{file}.py")]


@pytest.mark.parametrize("code", [*(f"import {name}" for name in LIGHT_MODULES), "HELP"])
def test_what_must_start_at_once_imports_nothing_heavy(code: str) -> None:
    if code == "HELP":
        code = "from launch.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    check = f"import sys\n{code}\nprint('heavy:', sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_the_configuration_imports_no_numpy() -> None:
    check = "import sys\nimport pretrain.config, pretrain.config.load\nprint({'numpy', 'einops'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"


def test_constraints_are_exact_versions_of_all_that_is_declared() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines), "names and versions only"
    names = [line.partition("==")[0].lower().replace("_", "-") for line in lines]
    assert names == sorted(set(names))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {re.split(r"[<>=\[; ]", item)[0] for item in declared} <= set(names)


@pytest.mark.parametrize("name", ["pretrain", "probe"])
def test_batch_scripts_are_package_data(name: str) -> None:
    assert files("slurm").joinpath(f"{name}.sbatch").is_file()


def test_presets_are_package_data() -> None:
    assert any(item.name.endswith(".yaml") for item in files("pretrain").joinpath("presets").iterdir())


def test_the_readme_names_every_preset() -> None:
    table = (ROOT / "pretrain/README.md").read_text(encoding="utf-8").split("## Presets")[1].split("##")[0]
    assert set(re.findall(r"^\| `(\w+)` ", table, re.MULTILINE)) == {preset.name for preset in list_presets()}


def imports_of_modules() -> dict[str, set[str]]:
    """Every module of the packages, and those that it imports, at any depth of the code but for types only."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.module is None or id(node) in typing_only:
                continue
            for alias in node.names:
                imported = f"{node.module}.{alias.name}"
                imported = imported if imported in modules else node.module
                if imported in modules and imported != name:
                    found[name].add(imported)
    return found


def circles(graph: dict[str, set[str]]) -> list[str]:
    """What is left of a graph when all that imports nothing of it is taken away again and again."""
    graph = dict(graph)
    while free := [name for name, imported in graph.items() if not imported & graph.keys()]:
        for name in free:
            del graph[name]
    return sorted(graph)


def test_no_module_imports_one_that_imports_it() -> None:
    assert not circles(imports_of_modules())


@pytest.mark.parametrize("package", ["data_pipelines", "launch"])
def test_no_room_imports_one_that_imports_it(package: str) -> None:
    """Neither at once nor by a detour; a room is a folder, or a loose module of the package."""
    modules = imports_of_modules()

    def room(name: str) -> str:
        return ".".join(name.split(".")[:2])

    graph: dict[str, set[str]] = {}
    for name, imported in modules.items():
        if within(name, (package,)):
            graph.setdefault(room(name), set()).update(room(other) for other in imported if room(other) != room(name))
    assert not circles(graph)


def test_only_a_method_knows_its_name() -> None:
    """What the rest asks of a method stands in its spec; the ladders over names must not grow back."""
    ladder = re.compile(
        r"isinstance\([a-z_.]*method|\.name (==|in|!=) \(?\"(mae|mim|dino|dvae|vqkd)|\b(Mae|Mim|Dino|Dvae|Vqkd)Config"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for package in PACKAGES
        for path in modules(package)
        if not path.is_relative_to(ROOT / "pretrain" / "methods")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if ladder.search(line)
    ]
    assert not found
