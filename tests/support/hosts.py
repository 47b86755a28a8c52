"""Two hosts on this machine: each has its own network, process ids, host name, /dev/shm and /run; folders are shared.

A host is one process in namespaces of its own. All that runs on the host ends with that process, and with the last one
its network goes too: nothing is left on the machine, also if the tests are killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.distributed.ranks import REPOSITORY, cpu_environment

NAMES = ("host-1", "host-2")
_PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "sshd", "ssh", "ssh-keygen", "pdsh")
_NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# $1: the host's name, $2: the folder of its files. It answers once with "up", and waits for its network before sshd.
_BOOT = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
echo up
read -r network || true
exec "$(command -v sshd)" -D -e -f "$2/sshd_config"
"""
_SSHD = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""
_SSH = """
Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


@dataclass(frozen=True)
class Host:
    """`address`: of its one interface, eth0. `pid`: of its first process, as this machine sees it."""

    name: str
    address: str
    pid: int

    def command(self, command: Sequence[object]) -> list[str]:
        """`command`, to be started here, runs on this host in the root of the repository."""
        return ["nsenter", f"--target={self.pid}", *_NAMESPACES, "env", f"--chdir={REPOSITORY}", *map(str, command)]

    def start(self, command: Sequence[object], **environment: str) -> subprocess.Popen[str]:
        """Its environment: that of a test's process, with the host's interface."""
        return subprocess.Popen(
            self.command(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=cpu_environment(**{"GLOO_SOCKET_IFNAME": "eth0", **environment}),
            start_new_session=True,
        )

    def run(self, *command: object) -> str:
        """What a short command prints; it must not fail."""
        done = subprocess.run(self.command(command), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command} on {self.name}: {done.stderr}"
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """All that run on it, but for its first one."""
        return [one for one in psutil.process_iter() if one.pid != self.pid and _place(one.pid) == _place(self.pid)]


@dataclass(frozen=True)
class TwoHosts:
    """`folder`: for files of the tests, which both see. A hostfile names one slot of each."""

    first: Host
    second: Host
    folder: Path

    @property
    def hostfile(self) -> Path:
        path = self.folder / "hostfile"
        path.write_text("".join(f"{host.name} slots=1\n" for host in self.hosts))
        return path

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.first, self.second

    def cut(self) -> None:
        """Cut the link between them: packets are lost, as when a cable is pulled; no connection is closed."""
        self.first.run("ip", "link", "set", "eth0", "down")

    def mend(self) -> None:
        """The link is back."""
        self.first.run("ip", "link", "set", "eth0", "up")


def _place(pid: int) -> str:
    """Which process ids the process sees."""
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return ""


def why_not() -> str:
    """Why there can be no two hosts on this machine; "" if they can be tried."""
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: openssh-server pdsh iproute2 util-linux)"
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "mount", "-t", "tmpfs", "tmpfs", "/run"], capture_output=True
    )
    return "" if tried.returncode == 0 else "namespaces are not allowed to this user: run as root"


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Both hosts, up to the end of the block. Skips the test, with the reason, where they cannot be."""
    if reason := why_not():
        pytest.skip(f"runs over two hosts were not checked: {reason}")
    addresses = dict(zip(NAMES, ("10.77.0.1", "10.77.0.2"), strict=True))
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in addresses.items()))
    (folder / "sshd_config").write_text(_SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(_SSH.format(folder=folder))
    booted = []
    try:
        for name in addresses:
            booted.append(_boot(name, folder))
        firsts = [psutil.Process(one.pid).children()[0].pid for one in booted]
        hosts = [Host(name, addresses[name], first) for name, first in zip(addresses, firsts, strict=True)]
        _link(hosts)
        for one in booted:
            one.stdin.close()
        found = TwoHosts(*hosts, folder)
        _wait_for_ssh(found)
        yield found
    finally:
        for one in booted:
            one.send_signal(signal.SIGKILL)  # --kill-child
            one.wait()


def _boot(name: str, folder: Path) -> subprocess.Popen[str]:
    """The process that holds the host up to its own end; also if this one is killed."""
    log = (folder / f"{name}.log").open("w")
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES, "--mount-proc", "--fork", "--kill-child"]
    process = subprocess.Popen(
        [*command, "sh", "-c", _BOOT, "sh", name, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={"PATH": _PATH},
    )
    said = process.stdout.readline()
    assert said == "up\n", f"{name} did not come up: {Path(log.name).read_text()}"
    return process


def _link(hosts: Sequence[Host]) -> None:
    ends = [["name", "eth0", "netns", str(host.pid)] for host in hosts]
    subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
    for host in hosts:
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            host.run("ip", "link", "set", interface, "up")


def _wait_for_ssh(hosts: TwoHosts) -> None:
    end = time.monotonic() + 20
    while True:
        done = subprocess.run(hosts.first.command(["ssh", hosts.second.name, "hostname"]), capture_output=True)
        if done.stdout.decode().strip() == hosts.second.name:
            return
        assert time.monotonic() < end, done.stderr.decode() + (hosts.folder / f"{hosts.second.name}.log").read_text()
        time.sleep(0.2)
