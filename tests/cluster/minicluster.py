"""A real SLURM cluster on one machine, in a folder that is thrown away (Debian: apt-get install slurm-wlm munge).

    python tests/cluster/minicluster.py start --dir DIR     prints what to export; the daemons stay
    python tests/cluster/minicluster.py stop --dir DIR

munged, slurmctld and some slurmd, as any user, with a configuration, ports, sockets and a munge key of their own, so
that it meets no other SLURM on the machine. Partitions: `main` (high priority), `scavenge` (preempted by `main`, its
jobs requeued after `grace` seconds) and `short` (a limit of one minute).

Nothing is left behind: a guard process waits for the end of who started the cluster, however it ends, and stops it;
and each start first stops those whose owner and guard are both gone. Only processes whose environment names this
folder's slurm.conf are ever signalled.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

PREFIX = "selfsight-slurm-"
SEARCHED = os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY"}

CONFIGURATION = """\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its old credential has expired: 120 s by default
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={port}
SrunPortRange={srun_ports}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# without slurmdbd there is no sacct: jobs stay visible to scontrol, and their ends are written to a file
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs.log
MinJobAge=86400
FirstJobId={first_job}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,preempt_youngest_first
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=5
OverTimeLimit=0
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=20
MessageTimeout=20
TCPTimeout=5
UnkillableStepTimeout=30
LaunchParameters=send_gids
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs={cpus} Boards=1 \
SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=16000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=OFF
PartitionName=scavenge Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=1 GraceTime={grace} PreemptMode=REQUEUE
PartitionName=short Nodes=ALL MaxTime=1 DefaultTime=1 PriorityTier=5 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs that a cluster needs and this machine has not."""
    return [name for name in NEEDED if shutil.which(name, path=SEARCHED) is None]


class MiniCluster:
    """A cluster in `folder` (a temporary one by default) of nodes n1, n2, ...: `start`, `stop`, or a `with` block.

    `env` is the environment by which SLURM's commands reach it, and with `extra` the one that jobs inherit.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        nodes: int = 3,
        cpus: int = 8,
        gpus: int = 2,
        grace: int = 20,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        # a Unix socket's path is limited to 107 bytes
        place = tempfile.gettempdir() if len(tempfile.gettempdir()) < 40 else "/tmp"
        self.folder = (folder or Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))).absolute()
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.cpus, self.gpus, self.grace, self.extra = cpus, gpus, grace, extra or {}
        self._conf = self.folder / "slurm.conf"
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def env(self) -> dict[str, str]:
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH_", "SRUN_", "SALLOC_"))}
        return outer | {"PATH": SEARCHED} | dict(self.extra) | {"SLURM_CONF": str(self._conf)}

    # -- the daemons ---------------------------------------------------------------------------------------------------

    def start(self, guarded: bool = True, timeout: float = 60) -> MiniCluster:
        """Start all daemons and wait until every node is idle; `guarded`: stop when this process ends."""
        reap_abandoned()
        for name in ("", "state", "log", "munge", *(f"spool.{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            (self.folder / name).chmod(0o755)
        self._configure()
        (self.folder / "owner").write_text(str(os.getpid() if guarded else 0))
        munge = self.folder / "munge"
        try:
            if guarded:
                # reads until the pipe's other end, which only this process holds, is closed by its end
                self._guard = self._spawn(
                    "guard", [sys.executable, __file__, "guard", "--dir", str(self.folder)], stdin=subprocess.PIPE
                )
            options = [f"--{what}-file={munge}/{what}" for what in ("key", "pid", "log", "seed")]
            self._daemon("munged", "--foreground", "--force", f"--socket={munge}/socket", *options)
            self.until((munge / "socket").exists, timeout, "munged to answer")
            self._daemon("slurmctld", "-D", "-i", "-f", str(self._conf))
            for node in self.nodes:
                self.start_slurmd(node)
            self.until_idle(timeout=timeout)
        except BaseException:
            self.stop(keep=True)
            raise
        return self

    def start_slurmd(self, node: str) -> None:
        """Start a node's daemon, such as one that was killed; its node comes back by itself."""
        self._daemon("slurmd", "-D", "-N", node, "-f", str(self._conf), name=node)

    def kill_slurmd(self, node: str) -> None:
        """kill -9 of a node's daemon: SLURM takes the node for lost, but what runs there goes on."""
        self._started[node].kill()
        self._started[node].wait()

    def stop(self, keep: bool = False, timeout: float = 15) -> None:
        """End all jobs and daemons and, unless to `keep`, remove the folder."""
        if any(comm == "slurmctld" for _, comm, _ in self.processes()):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                for options in (["--full", "--signal=KILL"], []):
                    self.run("scancel", *options, "--user", _user(), check=False, timeout=10)
        daemons = ("slurmd", "slurmctld", "munged")  # in this order; what they leave is killed
        for names in (*([name] for name in daemons), None):
            end = time.monotonic() + timeout
            sent = signal.SIGTERM if names else signal.SIGKILL
            while pids := [pid for pid, comm, _ in self.processes() if names is None or comm in names]:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, sent)
                for process in self._started.values():
                    process.poll()  # a child that nobody waits for stays visible
                if time.monotonic() > end:
                    break
                time.sleep(0.1)
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
        self._started.clear()
        (self.folder / "owner").unlink(missing_ok=True)
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> MiniCluster:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    # -- asking and waiting --------------------------------------------------------------------------------------------

    def run(
        self,
        *argv: str | Path,
        check: bool = True,
        timeout: float = 60,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, SLURM's or any other, against this cluster; `env` is added to the environment."""
        done = subprocess.run(
            [str(arg) for arg in argv],
            env={**self.env, **(env or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, argv))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def job(self, job: str) -> dict[str, str]:
        """A job's record, as `scontrol show job` has it; jobs that ended stay visible."""
        text = self.run("scontrol", "show", "job", "-o", job).stdout
        return dict(re.findall(r"([\w:/]+)=(.*?)(?= [\w:/]+=|\n|$)", text))

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, ..."""
        return self.job(job)["JobState"]

    def node(self, name: str) -> dict[str, str]:
        """A node's record, as `scontrol show node` has it."""
        text = self.run("scontrol", "show", "node", "-o", name).stdout
        return dict(re.findall(r"([\w:/]+)=(.*?)(?= [\w:/]+=|\n|$)", text))

    def ends(self, job: str) -> list[str]:
        """The lines of the job-completion file about a job, one for each end: a requeued job has several."""
        log = self.folder / "log" / "jobs.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if f"JobId={job} " in line]

    def wait(self, job: str, *states: str, timeout: float = 120) -> dict[str, str]:
        """The job's record as soon as it is in one of `states`; fails at once when it ended in another."""

        def there() -> bool:
            state = self.state(job)
            if state in ENDED and state not in states:
                raise AssertionError(f"job {job} is {state}, not {' or '.join(states)}\n{self.log(job)}")
            return state in states

        self.until(there, timeout, f"job {job} to be {' or '.join(states)}", about=lambda: self.log(job))
        return self.job(job)

    def until_idle(self, timeout: float = 60) -> None:
        """Wait until every node is idle: nothing runs, and those that were away are back."""
        self.until(lambda: self._nodes() == ["idle"] * len(self.nodes), timeout, "all nodes to be idle")

    def until(
        self, ready: Callable[[], bool], timeout: float, what: str, about: Callable[[], str] = lambda: ""
    ) -> None:
        """Poll until `ready()`; after `timeout` seconds an AssertionError says `what` did not come, and `about` it."""
        end = time.monotonic() + timeout
        while not ready():
            if time.monotonic() > end:
                raise AssertionError(f"waited {timeout:g} s for {what}\n{about() or self.daemon_logs()}")
            time.sleep(0.1)

    def log(self, job: str) -> str:
        """The job's record and the last of what it has printed."""
        record = self.job(job)
        out = Path(record.get("StdOut", ""))
        printed = "\n".join(out.read_text(errors="replace").splitlines()[-80:]) if out.is_file() else "(nothing)"
        keys = ("JobState", "Reason", "Restarts", "ExitCode", "NodeList", "StartTime", "EndTime")
        return f"{ {key: record.get(key) for key in keys} }\n--- {out}\n{printed}"

    def daemon_logs(self, lines: int = 15) -> str:
        """The ends of the daemons' logs."""
        logs = sorted((self.folder / "log").glob("*"))
        return "\n".join(
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) for log in logs
        )

    # -- processes -----------------------------------------------------------------------------------------------------

    def ranks(self, job: str) -> dict[int, int]:
        """Process ids of the tasks of a job's running steps, by rank: the processes that SLURM itself started."""
        found = {}
        for pid, _, environ in self.processes():
            ours = environ.get("SLURM_JOB_ID") == job and environ.get("SLURM_STEP_ID", "").isdigit()
            with contextlib.suppress(OSError, IndexError):
                parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
                if ours and Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                    found[int(environ["SLURM_PROCID"])] = pid
        return found

    def signal_rank(self, job: str, rank: int, number: int = signal.SIGKILL) -> None:
        """Signal one rank of a running job."""
        os.kill(self.ranks(job)[rank], number)

    def signal_step(self, job: str, number: int) -> list[int]:
        """Signal every process of a job's steps: STOP holds training still while a test prepares what is to happen.

        Returns their ids.
        """
        found = []
        for pid, comm, environ in self.processes():
            ours = environ.get("SLURM_JOB_ID") == job and environ.get("SLURM_STEP_ID", "").isdigit()
            if ours and not comm.startswith("slurmstepd"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                    found.append(pid)
        return found

    def processes_of(self, job: str) -> list[str]:
        """The command lines of everything that still runs for a job, on any node."""
        found = []
        for pid, _, environ in self.processes():
            if environ.get("SLURM_JOB_ID") == job:
                with contextlib.suppress(OSError):
                    found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def processes(self) -> Iterator[tuple[int, str, dict[str, str]]]:
        """Id, name and environment of the daemons of this cluster and of all that runs for its jobs.

        Not of a shell, or of a test, that merely exported our SLURM_CONF.
        """
        mine = f"SLURM_CONF={self._conf}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                content, comm = (entry / "environ").read_bytes(), (entry / "comm").read_text().strip()
            except OSError:  # ended meanwhile, or another user's
                continue
            if mine not in content.split(b"\0"):
                continue
            pairs = (item.partition("=") for item in content.decode(errors="replace").split("\0"))
            environ = {key: value for key, _, value in pairs}
            if "SLURM_JOB_ID" in environ or comm in ("munged", "slurmctld", "slurmd") or comm.startswith("slurmstepd"):
                yield int(entry.name), comm, environ

    # -- inside --------------------------------------------------------------------------------------------------------

    def _configure(self) -> None:
        first = _free_ports(1 + len(self.nodes) + 60)
        last_node = first + len(self.nodes)
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            user=_user(),
            folder=self.folder,
            port=first,
            node_ports=f"[{first + 1}-{last_node}]" if len(self.nodes) > 1 else first + 1,
            srun_ports=f"{last_node + 1}-{last_node + 60}",
            nodes=len(self.nodes),
            cpus=self.cpus,
            gpus=self.gpus,
            grace=self.grace,
            # ranks meet at a port that follows from the job's number: clusters side by side must not share numbers
            first_job=secrets.randbelow(600) * 1000 + 1,
        )
        self._conf.write_text(text)
        # any character devices pass for GPUs; where there are none, files do, but CUDA_VISIBLE_DEVICES stays unset
        device = "/dev/tty" if Path(f"/dev/tty{self.gpus - 1}").exists() else f"{self.folder}/gpu"
        for number in range(self.gpus if device != "/dev/tty" else 0):
            Path(f"{device}{number}").touch()
        (self.folder / "gres.conf").write_text(
            f"NodeName=n[1-{len(self.nodes)}] Name=gpu File={device}[0-{self.gpus - 1}]\n"
        )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\n")
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)

    def _daemon(self, program: str, *options: str, name: str | None = None) -> None:
        path = shutil.which(program, path=SEARCHED)
        if path is None:
            raise RuntimeError(f"{program} is not installed; on Debian: apt-get install slurm-wlm munge")
        self._started[name or program] = self._spawn(name or program, [path, *options])

    def _spawn(self, name: str, argv: Sequence[str], stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            # in a session of its own: a Ctrl-C in the terminal is for the tests, which then stop the cluster
            return subprocess.Popen(
                argv, env=self.env, cwd=self.folder, stdin=stdin, stdout=log, stderr=log, start_new_session=True
            )

    def _nodes(self) -> list[str]:
        for name, process in self._started.items():
            if process.poll() is not None and name not in self.nodes:
                raise AssertionError(f"{name} ended with {process.returncode}\n{self.daemon_logs()}")
        done = self.run("sinfo", "-h", "-p", "main", "-N", "-o", "%t", check=False)
        return done.stdout.split() if done.returncode == 0 else []


def reap_abandoned() -> None:
    """Stop the clusters of this user whose owner is dead, as is the guard that should have stopped them."""
    for note in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/owner"):
        with contextlib.suppress(OSError, ValueError):
            owner = int(note.read_text())
            if owner and note.stat().st_uid == os.getuid() and not Path(f"/proc/{owner}").exists():
                MiniCluster(note.parent).stop()


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> int:
    """The first of `count` consecutive free ports, below those that the kernel gives to clients."""
    for _ in range(200):
        first = 20_000 + secrets.randbelow(12_000 - count)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError(f"found no {count} consecutive free ports")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("action", choices=["start", "stop", "guard"])
    parser.add_argument("--dir", type=Path, required=True, help="the cluster's folder, with a path of 60 bytes at most")
    parser.add_argument("--nodes", type=int, default=3)
    arguments = parser.parse_args()
    cluster = MiniCluster(arguments.dir, nodes=arguments.nodes)
    if arguments.action == "start":
        cluster.start(guarded=False)
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf")
    elif arguments.action == "stop":
        cluster.stop()
    else:
        sys.stdin.read()
        cluster.stop()


if __name__ == "__main__":
    main()
