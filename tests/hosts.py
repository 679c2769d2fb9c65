"""Hosts with networks, disks and home folders of their own on one machine: a Ray cluster without a shared disk.

Each host is a set of Linux namespaces (network, mounts, processes, host name), so it needs root. The hosts `head`,
`worker1` and `worker2` form a Ray cluster with token authentication. `services` has an S3 server and an MLflow server.
`laptop` has the project and runs the commands of a user; it shares the network of the head, like a machine with an SSH
tunnel to the dashboard. The network exists only inside the namespaces, and no host sees the checkout of this test.
"""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from .processes import LIMIT_S, wait_until

ROOT = Path(__file__).resolve().parents[1]
TMP = Path(tempfile.gettempdir())
"""Temporary folder of every host, on its own disk."""
HOME = TMP / "home"
"""Home folder of every host, on its own disk."""
PROJECT = HOME / "parcelray"
"""The project on the laptop."""
_ADDRESSES = {"services": "10.7.0.254", "head": "10.7.0.1", "worker1": "10.7.0.11", "worker2": "10.7.0.12"}
_NAMESPACES = Path("/run/netns")
S3_URL = f"http://{_ADDRESSES['services']}:9000"
MLFLOW_URL = "http://mlflow:5000"
DASHBOARD_URL = "http://127.0.0.1:8265"
BUCKET = "parcelray"
RUNS = f"s3://{BUCKET}/runs"
"""Storage of the jobs."""
# Folders of the project that a submission needs; tests and figures would only be copied.
_PROJECT_FOLDERS = ("platform", "jobs", "search_spaces", "pipelines", "pyproject.toml", "requirements.lock")

_SETUP = r"""
set -eu
hostname "$name"
mount --make-rprivate /
# The environment is held in the new temporary folder while the folders above it are hidden.
mkdir -p "$root/tmp/.environment"
mount --bind "$environment" "$root/tmp/.environment"
mount -o remount,bind,ro "$root/tmp/.environment"
for file in hosts resolv.conf; do mount --bind "$root/$file" "/etc/$file"; done
mount --rbind "$root/tmp" "$temporary"
for folder in $hidden; do mkdir -p "$folder"; mount -t tmpfs -o size=1m tmpfs "$folder"; done
mkdir -p "$environment"
mount --bind "$temporary/.environment" "$environment"
mount -t tmpfs -o size=16g tmpfs /dev/shm
touch "$temporary/.ready"
# This shell is the first process of the host and collects the processes that lose their parent.
while :; do sleep 3600 & wait; done
"""

# Ray gives up if a node does not start within 30 s, which a busy machine exceeds.
RESTARTED = "for attempt in 1 2 3 4 5; do %s && break; sleep 1; done"
"""Shell script that repeats a command of `ray start`, as a service manager does."""

_ALL_NODES = """
import json, sys, time, urllib.request
from parcelray.cluster.auth import auth_headers, find_token
request = urllib.request.Request("http://127.0.0.1:8265/api/v0/nodes", headers=auth_headers(find_token()))
alive = -1
while alive != int(sys.argv[1]):
    time.sleep(0.5)
    try:
        nodes = json.load(urllib.request.urlopen(request, timeout=30))["data"]["result"]["result"]
        alive = sum(node["state"] == "ALIVE" for node in nodes)
    except (OSError, LookupError, TypeError):
        pass  # the dashboard has not started
"""


def why_no_hosts() -> str | None:
    """Returns the reason why this process cannot make hosts, or None if it can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    missing = [name for name in ("ip", "nsenter", "unshare", "setpriv") if shutil.which(name) is None]
    if missing:
        return f"needs {' and '.join(missing)}: apt-get install -y iproute2 util-linux"
    probe = "mount --make-rprivate / && mount -t tmpfs tmpfs /mnt && ip link add name probe type bridge"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "sh", "-c", probe],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"may not make namespaces here ({tried.stderr.strip()})" if tried.returncode else None


class Host:
    """One host: processes in namespaces of their own, started and ended by this test."""

    def __init__(self, folder: Path, name: str, network: str, variables: Mapping[str, str]) -> None:
        self.name = name
        self.folder = folder / name
        self.variables = dict(variables)
        self._started: list[subprocess.Popen[bytes]] = []
        environment = Path(sys.prefix)
        # The folder of a virtual environment may have an editable installation of this checkout.
        hidden = {ROOT} | ({environment.parent} if (environment / "pyvenv.cfg").is_file() else set())
        (self.folder / "tmp" / "home").mkdir(parents=True)
        (self.folder / "tmp").chmod(0o1777)
        lines = [*(f"{address} {host}" for host, address in _ADDRESSES.items()), "127.0.0.1 localhost"]
        (self.folder / "hosts").write_text("\n".join([*lines, f"{_ADDRESSES['services']} mlflow s3", ""]))
        (self.folder / "resolv.conf").touch()
        settings = {
            "name": name,
            "root": str(self.folder),
            "environment": str(environment),
            "temporary": str(TMP),
            "hidden": shlex.join(map(str, sorted(hidden))),
        }
        # Without this process, the host ends, too.
        isolate = "setpriv --pdeathsig KILL unshare --mount --uts --pid --fork --kill-child --mount-proc bash -c"
        with (self.folder / "setup.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["nsenter", f"--net={_NAMESPACES / network}", *isolate.split(), _SETUP],
                env=os.environ | settings,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        try:
            wait_until((self.folder / "tmp" / ".ready").exists, f"the host {name} is ready", self._process)
        except AssertionError as error:
            raise AssertionError(f"{error} {(self.folder / 'setup.log').read_text()}") from error
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self._first = int(children[0])

    def path(self, path: Path) -> Path:
        """Returns the path, outside of the host, of a file below its temporary folder."""
        return self.folder / "tmp" / path.relative_to(TMP)

    def command(self, script: str, folder: Path = HOME) -> list[str]:
        """Returns the command that runs a shell script on this host."""
        variables = [f"{name}={value}" for name, value in self.variables.items()]
        enter = ["nsenter", f"--target={self._first}", "--mount", "--uts", "--net", "--pid"]
        return [*enter, "env", f"--chdir={folder}", "-i", *variables, "bash", "-euo", "pipefail", "-c", script]

    def start(self, script: str, folder: Path = HOME, log: str = "output.log") -> subprocess.Popen[bytes]:
        """Starts a shell script whose output goes to a file next to the disk of the host."""
        with (self.folder / log).open("ab") as output:
            process = subprocess.Popen(
                self.command(script, folder),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def run(self, script: str, folder: Path = HOME, *, timeout_s: float = LIMIT_S, check: bool = True) -> str:
        """Runs a shell script to its end and returns its output; with `check`, a non-zero exit code fails the test."""
        done = subprocess.run(
            self.command(script, folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"On {self.name}, this exited with {done.returncode}: {script}\n{done.stdout}")
        return done.stdout

    def python(self, source: str, *arguments: str) -> Any:
        """Runs Python on this host and returns what the last line of its output is in JSON."""
        output = self.run(shlex.join(["python", "-c", textwrap.dedent(source), *arguments]))
        return json.loads(output.strip().splitlines()[-1])

    def kill(self) -> None:
        """Ends all processes of the host with SIGKILL."""
        self._process.kill()
        for process in (self._process, *self._started):
            process.wait(timeout=LIMIT_S)

    @property
    def is_alive(self) -> bool:
        """Whether the host has not been killed."""
        return self._process.poll() is None


class Hosts:
    """The hosts of one test process and their network."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._prefix = f"parcelray{os.getpid()}-"
        self.token = secrets.token_hex(32)
        self.variables = {
            "HOME": str(HOME),
            "PATH": f"{Path(sys.prefix) / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            # See tests/conftest.py.
            "RAY_worker_niceness": "0",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "AWS_ACCESS_KEY_ID": "parcelray",
            "AWS_SECRET_ACCESS_KEY": "of-this-test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": S3_URL,
            "MLFLOW_TRACKING_USERNAME": "cluster",
            "MLFLOW_TRACKING_PASSWORD": secrets.token_hex(16),
        }
        _remove_left_over()
        for name in _ADDRESSES:
            self._ip("netns", "add", self._prefix + name)
            stack.callback(subprocess.run, ["ip", "netns", "delete", self._prefix + name], check=False)
            self._ip("-n", self._prefix + name, "link", "set", "lo", "up")
        switch = ["-n", self._prefix + "services"]
        self._ip(*switch, "link", "add", "name", "bridge", "type", "bridge")
        self._ip(*switch, "address", "add", f"{_ADDRESSES['services']}/24", "dev", "bridge")
        self._ip(*switch, "link", "set", "bridge", "up")
        for name, address in _ADDRESSES.items():
            if name == "services":
                continue
            here = ["-n", self._prefix + name]
            self._ip(*switch, "link", "add", name, "type", "veth", "peer", "eth0", "netns", self._prefix + name)
            self._ip(*switch, "link", "set", name, "master", "bridge", "up")
            self._ip(*here, "address", "add", f"{address}/24", "dev", "eth0")
            self._ip(*here, "link", "set", "eth0", "up")
        self.services = self._host("services")
        self.head = self._host("head")
        self.workers = [self._host("worker1"), self._host("worker2")]
        self.laptop = self._host("laptop", network="head")
        self._copy_project()

    @property
    def all(self) -> list[Host]:
        """All hosts of the cluster and the laptop."""
        return [self.head, *self.workers, self.laptop]

    def num_checkpoints(self, run: str) -> int:
        """Returns how many checkpoints of a training are complete: Ray Train has recorded them on the S3 server."""
        return len(self._written(rf"{run}/[^/]+/checkpoint_manager_snapshot\.json"))

    def num_stored(self, folder: str) -> int:
        """Returns how many parquet files have been stored below a folder of the runs."""
        return len(set(self._written(rf"{folder}/\S+\.parquet")))

    def cut(self, host: Host) -> None:
        """Disconnects a host from the network, as if its cable was pulled; what happens inside the host goes on."""
        self._ip("-n", self._prefix + "services", "link", "set", host.name, "down")

    def connect(self, host: Host) -> None:
        """Connects a host to the network again."""
        self._ip("-n", self._prefix + "services", "link", "set", host.name, "up")

    def restart(self, number: int) -> Host:
        """Replaces a killed worker by a new host of the same name and address, with an empty disk."""
        name = self.workers[number].name
        shutil.rmtree(self._folder / name)
        self.workers[number] = self._host(name)
        return self.workers[number]

    def job_file(self, job: Mapping[str, Any]) -> str:
        """Writes a job file on the laptop, with the storage and the server of the cluster; returns its path there."""
        name = f"jobs/test-{job['kind']}-{job['name']}.yaml"
        common = {"tracking": {"uri": MLFLOW_URL}} | ({} if job["kind"] == "serve" else {"storage": RUNS})
        (self.laptop.path(PROJECT) / name).write_text(yaml.safe_dump(common | dict(job)), encoding="utf-8")
        return name

    def start_s3(self) -> None:
        """Starts the S3 server with one bucket; its objects are in memory."""
        self.s3 = server = self.services.start("exec moto_server -H 0.0.0.0 -p 9000", log="s3.log")
        create = f"import s3fs; s3fs.S3FileSystem().mkdir({BUCKET!r}); print('true')"
        wait_until(lambda: ":9000 " in self.services.run("ss -tln"), "the S3 server listens", server)
        self.services.python(create)

    def start_mlflow(self) -> None:
        """Starts the MLflow server as the systemd unit of deploy/mlflow does: with accounts and allowed hosts."""
        unit = (ROOT / "deploy" / "mlflow" / "mlflow.service").read_text(encoding="utf-8")
        entries = [line.partition("=")[::2] for line in unit.splitlines()]
        (command,) = [
            Path(value.split()[0]).name + value[len(value.split()[0]) :] for key, value in entries if key == "ExecStart"
        ]
        settings = dict(value.split("=", 1) for key, value in entries if key == "Environment") | {
            "MLFLOW_HOST": "0.0.0.0",
            "MLFLOW_AUTH_CONFIG_PATH": str(HOME / "basic_auth.ini"),
            "MLFLOW_BACKEND_STORE_URI": "sqlite:///mlflow.db",
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow",
            "MLFLOW_SERVER_ALLOWED_HOSTS": "mlflow:5000",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            "MLFLOW_AUTH_ADMIN_USERNAME": self.variables["MLFLOW_TRACKING_USERNAME"],
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.variables["MLFLOW_TRACKING_PASSWORD"],
        }
        shutil.copy(ROOT / "deploy" / "mlflow" / "basic_auth.ini", self.services.path(HOME))
        exported = shlex.join(f"{key}={value}" for key, value in settings.items())
        self.mlflow = server = self.services.start(f"exec env {exported} {command}", log="mlflow.log")
        wait_until(lambda: ":5000 " in self.services.run("ss -tln"), "the MLflow server listens", server)

    def stop(self, server: subprocess.Popen[bytes]) -> None:
        """Ends a server with SIGKILL."""
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(timeout=LIMIT_S)

    def start_head(self) -> subprocess.Popen[bytes]:
        """Starts Ray on the head, without logical CPUs."""
        return self.head.start(
            RESTARTED % f"ray start --head --block --node-ip-address={_ADDRESSES['head']} --port=6379 --num-cpus=0"
            " --dashboard-host=127.0.0.1 --object-store-memory=200000000",
            log="ray.log",
        )

    def start_worker(self, host: Host, num_cpus: int = 3) -> subprocess.Popen[bytes]:
        """Starts Ray on a worker.

        With three CPUs, a training with workers of two CPUs has one worker on each host, and CPUs to read its data.
        """
        return host.start(
            RESTARTED % f"ray start --block --address=head:6379 --node-ip-address={_ADDRESSES[host.name]}"
            f" --num-cpus={num_cpus} --object-store-memory=300000000",
            log="ray.log",
        )

    def wait_for_nodes(self, count: int) -> None:
        """Waits until the cluster has exactly this number of live nodes."""
        self.laptop.run(shlex.join(["python", "-c", _ALL_NODES, str(count)]))

    def _written(self, pattern: str) -> list[str]:
        """Objects of the runs that have been written, one entry for each time, by the log of the S3 server."""
        text = (self.services.folder / "s3.log").read_text(encoding="utf-8")
        return re.findall(rf'"PUT /{BUCKET}/runs/({pattern}) HTTP/1\.1" 200 ', text)

    def _host(self, name: str, network: str | None = None) -> Host:
        host = Host(self._folder, name, self._prefix + (network or name), self.variables)
        self._stack.callback(host.kill)
        token = host.path(HOME / ".ray" / "auth_token")
        token.parent.mkdir()
        token.touch(mode=0o600)
        token.write_text(self.token)
        return host

    def _copy_project(self) -> None:
        project = self.laptop.path(PROJECT)
        listing = subprocess.run(
            ["git", "-c", "safe.directory=*", "ls-files", "-z", *_PROJECT_FOLDERS],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in filter(None, listing.stdout.split("\0")):
            if (ROOT / name).is_file():
                (project / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, project / name)
        self.laptop.variables |= {
            "PYTHONPATH": str(PROJECT / "platform"),
            "RAY_API_SERVER_ADDRESS": DASHBOARD_URL,
            "MLFLOW_TRACKING_URI": MLFLOW_URL,
        }
        self.laptop.run(
            "git init -q && git add . && git -c user.name=test -c user.email=test@localhost commit -qm project", PROJECT
        )

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def make_hosts(folder: Path) -> Iterator[Hosts]:
    """Makes the hosts, and on exit ends everything that runs on them.

    Args:
        folder: an empty folder for the disks of the hosts.
    """
    with ExitStack() as stack:
        yield Hosts(folder, stack)


@contextmanager
def start_hosts(folder: Path) -> Iterator[Hosts]:
    """Makes the hosts, and starts Ray, the S3 server and the MLflow server; on exit ends everything.

    Args:
        folder: an empty folder for the disks of the hosts.
    """
    with make_hosts(folder) as hosts:
        hosts.start_head()
        hosts.start_s3()
        hosts.start_mlflow()
        for worker in hosts.workers:
            hosts.start_worker(worker)
        hosts.wait_for_nodes(1 + len(hosts.workers))
        yield hosts


def _remove_left_over() -> None:
    """Removes the network namespaces of test processes that were killed."""
    for path in _NAMESPACES.glob("parcelray*-*"):
        process = path.name.removeprefix("parcelray").partition("-")[0]
        if not Path("/proc", process).exists():
            subprocess.run(["ip", "netns", "delete", path.name], check=False)
