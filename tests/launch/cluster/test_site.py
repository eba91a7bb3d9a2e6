from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from launch.cluster.options import JobOptions, probe_resources, training_resources
from launch.cluster.render import container_python, render, settings_of
from launch.cluster.site import ContainerSite, Site, find_site, load_site, site_example
from pretrain.config.load import ConfigError


def profile(folder: Path, text: str) -> Path:
    path = folder / "site.yaml"
    path.write_text(text)
    return path


def test_where_it_is_looked_for(tmp_path: Path) -> None:
    named, of_variable = tmp_path / "named.yaml", tmp_path / "variable.yaml"
    home = tmp_path / "selfsight" / "site.yaml"
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert find_site(None, environ) is None
    home.parent.mkdir()
    home.touch()
    assert find_site(None, environ) == home
    assert find_site(None, environ | {"SELFSIGHT_SITE": str(of_variable)}) == of_variable
    assert find_site(named, environ | {"SELFSIGHT_SITE": str(of_variable)}) == named
    with pytest.raises(FileNotFoundError, match=r"--site-example > .*named.yaml"):
        load_site(named)


def test_the_example_is_empty_and_every_line_of_it_is_allowed(tmp_path: Path) -> None:
    assert load_site(profile(tmp_path, site_example())) == Site()
    keys = re.sub(r"(?m)^# ((?:[a-z_]+:|  ).*)$", r"\1", site_example().split("mkdir")[1].partition("\n")[2])
    data = yaml.safe_load(keys)
    assert set(data) == set(Site.__dataclass_fields__)
    del data["container"]
    found = load_site(profile(tmp_path, yaml.safe_dump(data)))
    assert found.gpus_per_node == 4
    assert found.probe.gpus == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partiton: gpu", r"unknown key partiton; did you mean partition\?"),
        ("probe: {gpu: 1}", r"unknown key probe.gpu; did you mean probe.gpus\?"),
        ("container: {immage: a}", r"container.immage; did you mean container.image\?"),
        ("nodes: 0", "nodes: .*greater than 0"),
        ("wandb: on-line", "wandb: .*'online', 'offline' or 'disabled'"),
        ('partition: "a\\nb"', "partition: must be one line"),
        ('modules: ["a\\nrm -rf x"]', "modules.0: must be one line"),
        ("environment: {a-b: 1}", "environment names 'a-b'"),
        ("environment: {SLURM_JOB_ID: 1}", "none of SLURM's own"),
        ("scratch: $(rm -rf x)", "scratch is .*; give an absolute path"),
        ("scratch: local", "scratch is 'local'"),
        ("{venv: a, container: {image: b}}", "keep one of them"),
        ("- a", "holds list"),
        ("nodes: 1\nnodes: 2", "'nodes' is set twice"),
    ],
)
def test_what_is_wrong_with_one_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_site(profile(tmp_path, text))


def test_the_command_line_wins_over_the_profile_and_that_over_variables() -> None:
    site = Site(partition="gpu", account="ours", nodes=2, gpus_per_node="a100:4", cpus_per_task=8, time="1-00")
    environ = {"SBATCH_PARTITION": "other", "SBATCH_QOS": "high"}
    asked = training_resources(JobOptions(nodes=3, partition="big"), site, environ)
    assert (asked.nodes, asked.partition, asked.account, asked.qos) == (3, "big", "ours", "high")
    assert (asked.tasks_per_node, asked.ranks, asked.signal_seconds) == (4, 12, 180)
    assert "#SBATCH --gpus-per-node=a100:4" in asked.lines()
    probe = probe_resources(JobOptions(), site, asked)
    assert (probe.nodes, probe.gpus_per_node, probe.cpus_per_task, probe.partition) == (1, "a100:1", 8, "big")
    assert probe_resources(JobOptions(probe_gpus=0), site, asked).gpus_per_node is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (JobOptions(time="1:2:3:4"), "--time '1:2:3:4' is no time"),
        (JobOptions(time="tomorrow"), "--time 'tomorrow' is no time"),
        (JobOptions(gpus_per_node="many"), "--gpus-per-node is 'many'"),
        (JobOptions(gpus_per_node="2", tasks_per_node=3), "a GPU has one process"),
        (
            JobOptions(time="10", signal_seconds=600),
            r"--signal-seconds 600 is no less than the time limit 10 \(600 s\)",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options: JobOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_resources(options, Site(), {})


def test_a_short_job_is_warned_early_enough_to_do_something_first() -> None:
    assert training_resources(JobOptions(time="4"), Site(), {}).signal_seconds == 60


def test_settings_are_what_the_profile_says() -> None:
    site = Site(
        modules=("cuda/12.8", "a; touch x"), venv="/v", interface="ib0", scratch="$JOBFS/a", wandb="offline",
        environment={"A": "it's", "B": True},
    )  # fmt: skip
    text = "\n".join(settings_of(site, "/v/bin/python", {"C": "$(x)"}))
    assert "module load cuda/12.8 'a; touch x' || exit 2" in text
    for line in ("NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0", "WANDB_MODE=offline", "B=1", "C='$(x)'"):
        assert f"export {line}\n" in text + "\n"
    assert 'export PATH=/v/bin:"$PATH"' in text
    assert 'export SLURM_TMPDIR="${JOBFS:?' in text
    script = render("pretrain", ["#SBATCH --nodes=2"], text.splitlines(), "selfsight submit")
    assert script.count("#SBATCH") == 1


def test_python_in_a_container_is_the_containers_process() -> None:
    text = container_python(ContainerSite(image="/my image.sif", binds=("/a",), python="python3"))
    assert text.splitlines()[1] == "exec apptainer exec --nv --bind /a '/my image.sif' python3 \"$@\""


def test_a_place_of_the_same_cluster_has_its_own_partition_and_gpus(tmp_path: Path) -> None:
    path = profile(tmp_path, "partition: cpu\ntime: 60\nat: {a100: {partition: a100, gpus_per_node: 8}}")
    there = load_site(path, "a100")
    assert (there.partition, there.gpus_per_node, there.time) == ("a100", 8, 60)
    assert load_site(path).partition == "cpu"
    with pytest.raises(ConfigError, match=r"no such place .*: a100"):
        load_site(path, "h100")
    with pytest.raises(ConfigError, match="no site profile"):
        load_site(None, "a100")
    with pytest.raises(ConfigError, match=r"at.a100.partiton; did you mean at.a100.partition\?"):
        load_site(profile(tmp_path, "at: {a100: {partiton: x}}"), "a100")
