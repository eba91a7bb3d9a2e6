"""What a user types arrives at the trainer byte for byte, through a real sbatch, and none of it is run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from workplace import Workplace, queued

#: Stands for the interpreter: writes down how the trainer is called; everything else is Python as ever.
RECORDER = """#!{python}
import json, os, sys
if sys.argv[1:3] == ["-m", "pretrain"]:
    json.dump([os.getcwd(), sys.argv[3:], os.environ.get("GIVEN")], open({out!r}, "w"), ensure_ascii=True)
    sys.exit(0)
os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""
NASTY = (
    'it\'s "q" $(touch INJECTED) `touch INJECTED` ; touch INJECTED & \\ ${HOME} %j %% # ! * 日本 é\n-n\r\nEOF\n\t\x07'
)


def test_everything_arrives_byte_for_byte(workplace: Workplace) -> None:
    folder = workplace.folder / "a b'c\"d $(touch INJECTED)`x`;&%j#é"
    folder.mkdir()
    preset = workplace.preset("tiny")
    preset = preset.rename(folder / "my 'own' $(touch INJECTED).yaml")
    recorder, out = workplace.folder / "python", workplace.folder / "recorded.json"
    recorder.write_text(RECORDER.format(python=sys.executable, out=str(out)))
    recorder.chmod(0o755)
    profile = folder / "site.yaml"
    profile.write_text(json.dumps({"environment": {"GIVEN": "$(touch INJECTED)'\" %j"}, "constraint": None}))
    overrides = [
        "name=tiny",
        f"description={json.dumps(NASTY)}",
        "runs=runs of $(touch INJECTED) 'q' %j %%",
        "tracking.tags=['a b', \"$(x)\"]",
    ]
    command = [sys.executable, "-m", "launch", "submit", preset.name, *overrides, "--site=site.yaml", "--time=10"]
    done = workplace.cluster.run(*command, cwd=folder, env={"SELFSIGHT_PYTHON": str(recorder)}, timeout=120)
    job, _ = queued(done.stdout)
    workplace.cluster.wait(job, "COMPLETED", timeout=120)
    where, arguments, given = json.loads(out.read_text())
    assert where == str(folder)
    assert arguments == [preset.name, *overrides]
    assert given == "$(touch INJECTED)'\" %j"
    log = folder / "runs of $(touch INJECTED) 'q' %j %%" / "tiny" / "logs" / f"{job}.out"
    assert log.is_file()
    assert not [path for path in workplace.folder.rglob("*") if path.name == "INJECTED"]
    assert not Path("INJECTED").exists()


def test_control_characters_in_arguments_arrive_too(workplace: Workplace) -> None:
    from launch.cluster.quoting import bash_words
    from launch.cluster.render import render

    out = workplace.folder / "out"
    words = [NASTY, "", "-", "--", "x=\udcff", "a\n#SBATCH --nodes=99\nb"]
    script = render("probe", ["#SBATCH --output=/dev/null"], [f"set -- {bash_words(words)}"], bash_words(words))
    head, _, _ = script.partition("set -uo pipefail")
    path = workplace.folder / "job.sbatch"
    path.write_bytes(os.fsencode(f"{head}printf '%s\\0' \"$@\" > {out}\n"))
    workplace.cluster.wait(workplace.sbatch(path), "COMPLETED", timeout=60)
    assert os.fsdecode(out.read_bytes()).split("\0")[:-1] == words
