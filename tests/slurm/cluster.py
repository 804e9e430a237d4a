"""A real Slurm cluster of two nodes on this machine: munge, the controller, and a daemon for each node."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tiny_runs import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
FirstJobId={first_job}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:1
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
"""Jobs of `high` take the nodes of `low`. A requeued job waits for `cred_expire` seconds, of which 5 are the least."""


def obstacle() -> str | None:
    """Why this machine cannot run a cluster; None if it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "only root can start Slurm's daemons"


class Cluster:
    """The commands of a running cluster, and its daemons.

    Args:
        folder: of all its files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self._environment = kept | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RENDEZVOUS_HOST": "127.0.0.1",  # the names of the nodes are known to Slurm alone
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str, **environment: str) -> str:
        """Output of a command of Slurm's, run in the repository."""
        result = subprocess.run(
            command, cwd=ROOT, env=self._environment | environment, capture_output=True, text=True, timeout=120
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr}")
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job, or of an element of an array."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", number)))

    def ended(self, number: str) -> dict[str, str]:
        """The same, once the job has ended; a job in the queue has not."""
        self.until(lambda: self.job(number)["JobState"] in ENDED, f"job {number} ends")
        return self.job(number)

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
        """Wait for something to come true.

        Raises:
            TimeoutError: it does not within so many seconds; with the ends of all logs.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = [f"{path.name}: {path.read_text()[-2000:]}" for path in self._folder.glob("*.log")]
                raise TimeoutError("\n".join([f"{what}: not within {seconds} seconds", *logs]))
            time.sleep(0.1)

    def start(self) -> None:
        """Start the daemons, and wait until jobs can run."""
        self._write_files()
        files = {"socket": "socket", "key-file": "key", "seed-file": "seed", "pid-file": "pid", "log-file": "log"}
        options = [f"--{option}={self._folder}/munge.{name}" for option, name in files.items()]
        # By force, since a folder of pytest's is closed to others, who need not come in.
        self._start_daemon("munged", "--foreground", "--force", "--num-threads=1", *options)
        self.until((self._folder / "munge.socket").exists, "munged listens", 20)
        self._start_daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._start_daemon("slurmd", "-D", "-N", node)
        self.until(self._is_idle, "both nodes are idle", 30)

    def _write_files(self) -> None:
        key = self._folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        configuration = CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            ports=_free_ports(3),
            folder=self._folder,
            first_job=os.getpid(),  # a job's rendezvous port comes from its number
        )
        (self._folder / "slurm.conf").write_text(configuration)
        (self._folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")  # a GPU that no program can use
        for name in ("state", "n1", "n2"):
            (self._folder / name).mkdir()

    def _start_daemon(self, *command: str) -> None:
        """It ends with this process, even if that is killed."""
        with (self._folder / f"{len(self._daemons)}.{command[0]}.log").open("w") as log:
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command], env=self._environment, stdout=log, stderr=log
            )
        self._daemons.append(daemon)

    def _is_idle(self) -> bool:
        try:
            return set(self.run("sinfo", "--noheader", "--Node", "--format=%T").split()) == {"idle"}
        except RuntimeError:  # the controller does not listen yet
            return False

    def stop(self) -> None:
        """End the daemons and whatever jobs have started."""
        self.until(self._is_killed, "the cluster is gone", 30)
        for daemon in self._daemons:
            daemon.wait()

    def _is_killed(self) -> bool:
        """Kills what runs with this cluster's configuration; true if there was nothing."""
        setting = f"SLURM_CONF={self._folder}/slurm.conf".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                if setting in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        for number in found:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        return not found


def _free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


@contextmanager
def open_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster that keeps its files in `folder`; in the end nothing of it runs any more."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
