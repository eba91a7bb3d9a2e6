from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import config_data, write_shards

from launch.cli import app
from launch.cluster.options import JobOptions, training_resources
from launch.cluster.probes import ProbeOptions
from launch.cluster.site import ContainerSite, Site
from launch.cluster.submit import Plan, Request, plan_submission
from pretrain.config.load import ConfigError, load_config
from pretrain.survival.run_folder import check_run_folder, write_config


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder


@pytest.fixture
def request_(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """The submission of a tiny run on two nodes, from a folder of its own."""
    monkeypatch.chdir(tmp_path)
    data = config_data("mae", "vit", shards, Path("runs")) | {"name": "tiny"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    resources = training_resources(JobOptions(nodes=2, time="1:00:00"), Site(), {})
    return Request("tiny.yaml", (), resources, Site(), sys.executable, ("selfsight", "submit", "tiny.yaml"))


def plan(request: Request, **changes: Any) -> Plan:
    return plan_submission(replace(request, **changes), check_cluster=False)


def sound(script: str) -> None:
    for checker in (["bash", "-n", "/dev/stdin"], ["shellcheck", "--shell=bash", "-"]):
        if shutil.which(checker[0]):
            done = subprocess.run(checker, input=script, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr


def test_a_plan_writes_nothing_and_its_scripts_are_sound(request_: Request, shards: Path, tmp_path: Path) -> None:
    site = Site(
        partition="gpu", modules=("cuda/12", "a b"), interface="ib0", scratch="$JOBFS", mail="me@example.org",
        environment={"A": "it's"}, wandb="offline",
    )  # fmt: skip
    shutil.copy(shards / "train-000000.tar", tmp_path / "val-000000.tar")
    before = sorted(tmp_path.rglob("*"))
    planned = plan(request_, site=site, overrides=("description=a 'b' $(c)",))
    sound(planned.script)
    sound(plan(request_, arrays=("seed=0,1",), array_max=1).script)
    assert sorted(tmp_path.rglob("*")) == before
    header = planned.script.split("set -uo pipefail")[0]
    for line in ("--job-name=tiny", "--nodes=2", "--time=1:00:00", "--requeue", "--signal=B:USR1@180"):
        assert f"#SBATCH {line}\n" in header
    assert f"#SBATCH --output={tmp_path}/runs/tiny/logs/%j.out\n" in header
    assert "set -- tiny.yaml 'description=a '" in header
    assert any("8 = 2 ranks x 4 x 1 accumulated" in line for line in planned.lines)


def test_the_command_is_written_down_without_its_passwords(request_: Request) -> None:
    command = ("selfsight", "submit", "tiny.yaml", "--data", "https://me:hunter2@host/set?token=hunter3")
    planned = plan(request_, command=command)
    assert "hunter" not in planned.script
    assert planned.request.told[-1] == "https://***@host/set?***"


def test_the_batch_is_solved_and_the_trainer_told(request_: Request) -> None:
    assert "set -- tiny.yaml train.grad_accum_steps=2\n" in plan(request_, micro_batch=2).script
    three = replace(request_.resources, nodes=3)
    with pytest.raises(ConfigError, match="does not divide over 3 ranks"):
        plan(request_, resources=three)


def test_what_is_the_same_for_all_of_a_sweep_is_told_once(request_: Request) -> None:
    told = plan(request_, arrays=("optim.lr=1e-3,5e-4",)).lines
    assert [line.partition(" ")[0] for line in told if "global batch" in line] == ["global"]
    assert [line.partition(" ")[0] for line in told if "learning rate" in line] == ["tiny-lr-1e-3:", "tiny-lr-5e-4:"]


def test_what_settings_and_shards_tell_is_told_without_torch(tmp_path: Path, shards: Path) -> None:
    """On a login node its import takes up to a minute."""
    script = (
        "import sys; from launch.pretrain_command import check_run; from pretrain.config.load import load_config\n"
        "try: check_run(load_config('mae_vit_cifar_cpu', sys.argv[1:]), 1)\n"
        "except (ValueError, OSError) as error: print(error, 'torch' in sys.modules)"
    )
    photos = tmp_path / "photos"
    (photos / "cat").mkdir(parents=True)
    (photos / "cat" / "1.JPG").touch()
    for data, given, told in (
        (photos, "seed=1", f"holds no .tar shards; make some with `selfsight pack {photos} SHARDS`"),
        (shards, "train.batch_size=4096", "samples; a batch holds different samples"),
        (shards, "train.steps=1", "more than the 1 of the run"),
    ):
        command = [sys.executable, "-c", script, f"data.train={data}", "train.batch_size=8", given]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert told in done.stdout
        assert done.stdout.strip().endswith("False")


def test_a_folder_of_another_configuration_or_a_finished_run_is_refused(request_: Request, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    write_config(run, load_config("tiny.yaml", ["seed=7"]))
    with pytest.raises(ConfigError, match="another configuration:\n  seed: 7 -> 0"):
        plan(request_)
    shutil.rmtree(run)
    (run / "encoder").mkdir(parents=True)
    (run / "encoder" / "config.json").write_text('{"step": 8}')
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        plan(request_)
    config = load_config(run.parent.parent / "tiny.yaml")
    from pretrain.run import resolve
    from pretrain.stream.datasets import open_datasets

    write_config(run, resolve(config, open_datasets(config.data))[0])
    with pytest.raises(ConfigError, match=r"is finished; .*another --name"):
        plan(request_)
    assert plan(request_, overrides=("name=other",)).name == "other"


def test_what_is_written_before_a_start_makes_no_folder_another_runs(tmp_path: Path, request_: Request) -> None:
    run = tmp_path / "runs" / "tiny"
    for part in ("jobs", "logs"):
        (run / part).mkdir(parents=True)
    (run / "history.jsonl").touch()
    assert check_run_folder(load_config("tiny.yaml")) == Path("runs/tiny")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"overrides": ("data.train=nowhere",)}, FileNotFoundError, "nowhere"),
        ({"overrides": ("optim.warmup_epochs=9",)}, ConfigError, "more than the 8 of the run"),
        ({"overrides": ("optim.rl=1",)}, ConfigError, "did you mean optim.lr"),
        ({"overrides": ("name=../../etc",)}, ConfigError, "name"),
        ({"overrides": ("name=a\nb",)}, ConfigError, "name"),
        ({"overrides": ("runs=back\\slash",)}, ValueError, "backslash"),
        ({"overrides": ('runs="a\\nb"',)}, ValueError, "line breaks"),
        ({"overrides": ("runs=tiny.yaml/runs",)}, OSError, "is a file"),
        ({"python": "/no/python"}, ValueError, "jobs' Python /no/python can't be run"),
        ({"python": "/bin/false"}, ValueError, "jobs' Python /bin/false can't be run"),
        ({"site": Site(container=ContainerSite(image="/no.sif"))}, FileNotFoundError, "container.image /no.sif"),
        ({"probe": ProbeOptions(every=1.0)}, ConfigError, "add --probe DATA"),
        ({"probe": ProbeOptions(data=("nowhere",))}, FileNotFoundError, "nowhere"),
        ({"arrays": ("seed=1,x",)}, ConfigError, "tiny-seed-x: .*seed"),
        ({"arrays": ("train.batch_size=8,9",)}, ConfigError, "tiny-batch_size-9: .*does not divide"),
    ],
)
def test_what_can_be_refused_is(
    request_: Request, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan(request_, **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_sweep_is_runs_of_their_own_in_one_group(request_: Request, tmp_path: Path) -> None:
    planned = plan(request_, arrays=("optim.lr=1e-3,5e-4", "seed=0,1"), array_max=2)
    assert "#SBATCH --array=0-3%2\n" in planned.script
    assert "#SBATCH --output=" + f"{tmp_path}/runs/tiny/logs/%A_%a.out\n" in planned.script
    own = "optim.lr=5e-4 seed=0 name=tiny-lr-5e-4-seed-0 tracking.group=tiny tracking.job_type=sweep"
    assert f"  2) set -- tiny.yaml {own} ;;" in planned.script
    assert [run.folder.name for run in planned.runs][2] == "tiny-lr-5e-4-seed-0"


def test_probes_wait_for_their_training_or_watch_it(request_: Request, shards: Path, tmp_path: Path) -> None:
    labelled = tmp_path / "labelled $(x)"
    labelled.mkdir()
    shutil.copy(shards / "train-000000.tar", labelled)
    shutil.copy(shards / "train-000001.tar", labelled / "val-000000.tar")
    options = ProbeOptions((str(labelled),), 0.2, ("logistic",), resources=request_.resources)
    behind, beside = plan(request_, probe=options).probes
    assert behind.dependency("7") == ["--dependency=afterok:7", "--kill-on-invalid-dep=yes"]
    assert beside.dependency("7") == ["--dependency=after:7"]
    assert f"set -- {tmp_path}/runs/tiny --data '{labelled}' --also logistic --follow\n" in beside.script
    assert f"--data '{labelled}' --also logistic\n" in behind.script
    with pytest.raises(ValueError, match="no probe 'logstic'; there are "):
        plan(request_, probe=ProbeOptions((str(labelled),), also=("logstic",)))
    with pytest.raises(ConfigError, match="add --probe DATA"):
        plan(request_, probe=ProbeOptions(also=("logistic",)))
    with pytest.raises(ConfigError, match="--probe-group-by says what belongs together, but not on what"):
        plan(request_, probe=ProbeOptions(group_by="patient"))
    with pytest.raises(ValueError, match="patient"):
        plan(request_, probe=ProbeOptions((str(labelled),), group_by="patient"))
    with pytest.raises(ConfigError, match="--probe-label says what is predicted, but not on what; add --probe DATA"):
        plan(request_, probe=ProbeOptions(label="age"))
    with pytest.raises(ValueError, match="has the field age in its"):
        plan(request_, probe=ProbeOptions((str(labelled),), label="age"))
    with pytest.raises(ValueError, match=r"the probe logistic is of labels of kind .*, and these are of kind number"):
        plan(request_, probe=ProbeOptions((str(labelled),), also=("logistic",), label_kind="number"))
    graded, _ = plan(request_, probe=replace(options, label_kind="grade")).probes
    assert f"--data '{labelled}' --also logistic --label-kind grade\n" in graded.script
    assert "checkpoint.milestone_every_epochs=0.2" in plan(request_, probe=options).script
    of_array = plan(request_, probe=options, arrays=("seed=0,1",)).probes
    assert [probe.dependency("7")[0] for probe in of_array] == [
        "--dependency=aftercorr:7", "--dependency=after:7_0", "--dependency=after:7_1",
    ]  # fmt: skip
    for probe in (behind, *of_array):
        sound(probe.script)


def test_the_example_profile_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["submit", "--site-example"])
    assert ended.value.code == 0
    assert "# partition: gpu" in capsys.readouterr().out
