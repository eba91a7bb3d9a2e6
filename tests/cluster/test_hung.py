"""A rank that stands still: the others say which one it is, and the job ends within a bounded time."""

from __future__ import annotations

import re
import signal
import sys

import pytest
from workplace import Workplace

from pretrain.survival.stopping import EXIT_HUNG


@pytest.mark.cluster_full
def test_a_stopped_rank_is_named_and_the_job_ends(workplace: Workplace) -> None:
    limits = {"hang_floor_seconds": 15, "hang_factor": 5}
    preset = workplace.preset("hung", train={"steps": 1_000_000, "batch_size": 8}, engine=limits)
    script = workplace.folder / "hung.sh"
    script.write_text(f"#!/bin/bash\nexec srun --kill-on-bad-exit=1 {sys.executable} -m pretrain {preset}\n")
    job = workplace.sbatch("--nodes=2", "--ntasks-per-node=1", "--exclusive", "--no-requeue", script)
    workplace.until_step("hung", 20, job)
    workplace.cluster.signal_rank(job, 1, signal.SIGSTOP)
    workplace.cluster.wait(job, "FAILED", timeout=150)
    ended = workplace.history("hung")[-1]
    assert (ended["event"], ended["code"]) == ("ended", EXIT_HUNG)
    assert "rank 1 on n2 gives no sign of life" in ended["reason"]
    (stacks,) = (workplace.runs / "hung" / "stacks").glob("rank-00000-step-*.txt")
    assert re.search("all_(gather|reduce)", stacks.read_text())  # whichever it met first: gradients, or the agreement
    assert "rank 1 on n2 gives no sign of life" in stacks.read_text()
