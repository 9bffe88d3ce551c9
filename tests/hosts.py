"""Network namespaces of this machine as hosts, each with its own address, host name, processes and link.

    with Hosts(["hosta", "hostb"], folder) as hosts:
        hosts.mpirun(["hosta", "hostb"], ["script.py"]).communicate()

Needs root on Linux, `ip` (iproute2), `nsenter` and `unshare` (util-linux). mpirun starts its daemons through `agent`
below, as it would through ssh. All ends with the `with` block; nothing outside the namespaces is changed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from mmdit_lib.parallel import mpi_environment

TESTS = Path(__file__).parent
TMPDIR = "TMPDIR"
"""Each host has its own; its processes are found by it."""

PORT = 2222
NETWORK = "10.77.0"


def why_not() -> str | None:
    """Why this machine cannot make such hosts; None if it can."""
    missing = [program for program in ("ip", "nsenter", "unshare") if not shutil.which(program)]
    if missing:
        return f"{missing[0]} is not installed"
    tried = subprocess.run(["unshare", "-n", "-u", "-m", "-p", "-f", "true"], capture_output=True, text=True)
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else None


def processes_with(variable: str, value: str) -> list[psutil.Process]:
    """The processes that have this environment variable."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(variable) == value:
                found.append(process)
    return found


class Hosts:
    """Hosts on one switch, named `names`. `folder` holds their files and their own temporary folders."""

    def __init__(self, names: list[str], folder: Path):
        self.names, self.folder = names, folder
        self.running: dict[str, psutil.Process] = {}  # the first process of each host
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        entries = [f"{NETWORK}.{i + 1} {name}" for i, name in enumerate(self.names)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *entries, ""]))
        try:
            self.switch = self._start(["-n"], ["sleep", "infinity"])
            self._inside(self.switch, "ip link add switch type bridge; ip link set switch up")
            for name in self.names:
                self.add(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for process in self._started:
            process.kill()  # and with it, by unshare's --kill-child, all processes of its host
            process.wait()
        for name in self.names:
            deadline = time.monotonic() + 10
            while self.processes(name) and time.monotonic() < deadline:
                time.sleep(0.05)

    def add(self, name: str) -> None:
        (self.folder / name).mkdir()
        serve = [sys.executable, __file__, "serve", name, str(self.folder / "hosts")]
        self.running[name] = first = self._start(
            ["-n", "-u", "-m", "-p", "--mount-proc"], ["env", f"{TMPDIR}={self.folder / name}", *serve]
        )
        address = f"{NETWORK}.{self.names.index(name) + 1}/24"
        link = f"ip link add {name} type veth peer name eth0 netns {first.pid}"
        self._inside(self.switch, f"{link}; ip link set {name} master switch; ip link set {name} up")
        self._inside(first, f"ip link set lo up; ip address add {address} dev eth0; ip link set eth0 up")
        deadline = time.monotonic() + 10
        while not (self.folder / name / "ready").exists():
            assert time.monotonic() < deadline, f"{name} did not start"
            time.sleep(0.02)

    def _start(self, flags: list[str], command: list[str]) -> psutil.Process:
        """Start `command` in new namespaces; returns its process, not unshare's."""
        unshare = ["unshare", *flags, "--fork", "--kill-child", *command]
        process = subprocess.Popen(unshare, start_new_session=True)
        self._started.append(process)
        deadline = time.monotonic() + 10
        while not (children := psutil.Process(process.pid).children()):
            assert time.monotonic() < deadline and process.poll() is None, "no namespaces"
            time.sleep(0.01)
        return children[0]

    @staticmethod
    def _inside(process: psutil.Process, commands: str) -> None:
        """Run shell commands in a process's network."""
        subprocess.run(["nsenter", "-t", str(process.pid), "-n", "sh", "-ec", commands], check=True)

    def start(self, name: str, words: list) -> subprocess.Popen:
        """Run a command on a host."""
        enter = ["nsenter", "-t", str(self.running[name].pid), "-n", "-u", "-m", "-p"]
        temporary = f"{TMPDIR}={self.folder / name}"
        return subprocess.Popen(
            [*enter, "env", temporary, *map(str, words)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL, env=os.environ | mpi_environment(1) | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        )  # fmt: skip

    def mpirun(self, names: list[str], arguments: list, at: str | None = None) -> subprocess.Popen:
        """`mpirun python arguments` on host `at` (the first), with one rank on each of `names`, in this order."""
        file = self.folder / f"hostfile-{'-'.join(names)}"
        file.write_text("".join(f"{name} slots=1\n" for name in names))
        agent = ["--prtemca", "plm_ssh_agent", f"{sys.executable} {__file__} agent"]
        mpirun = [Path(sys.executable).parent / "mpirun", "--hostfile", file, "--map-by", "slot", *agent]
        return self.start(at or names[0], [*mpirun, sys.executable, *arguments])

    def processes(self, name: str) -> list[psutil.Process]:
        """All processes of a host except its first."""
        return [p for p in processes_with(TMPDIR, str(self.folder / name)) if p != self.running.get(name)]

    def bind(self, name: str, source: Path | None, target: Path) -> None:
        """Let a host see folder `source` as `target`; None: as the others do."""
        words = ["mount", "--bind", source, target] if source else ["umount", target]
        assert self.start(name, words).wait() == 0

    def cut(self, name: str) -> None:
        """Pull the host's cable out of the switch."""
        self._inside(self.switch, f"ip link set {name} down")

    def vanish(self, name: str) -> None:
        """Cut the host off and end all of its processes at once, as a power failure does."""
        self.cut(name)
        self.running[name].kill()


def serve(name: str, names: str) -> None:
    """The first process of a host: sets it up, runs what `agent` asks for, and reaps all orphans."""
    socket.sethostname(name)
    subprocess.run(["mount", "--bind", names, "/etc/hosts"], check=True)
    listener = socket.create_server(("", PORT))
    Path(os.environ[TMPDIR], "ready").touch()
    listener.settimeout(0.05)
    asked: dict[int, socket.socket] = {}
    while True:
        try:
            peer, _ = listener.accept()
            command = peer.makefile().readline()
            child = os.fork()
            if not child:
                os.setsid()
                for number in (0, 1, 2):
                    os.dup2(peer.fileno(), number)
                os.execvp("sh", ["sh", "-c", json.loads(command)])
            asked[child] = peer
        except TimeoutError:
            pass
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if peer := asked.pop(ended[0], None):
                    peer.sendall(f"\0{os.waitstatus_to_exitcode(ended[1])}\0".encode())
                    peer.close()
        except ChildProcessError:
            pass


def agent(host: str, command: str) -> int:
    """In place of ssh: run `command` on `host` and show its output; returns its exit code."""
    with socket.create_connection((host, PORT), timeout=10) as peer:
        peer.settimeout(None)
        peer.sendall(json.dumps(command).encode() + b"\n")
        received = b""
        while not received.endswith(b"\0"):
            new = peer.recv(65536)
            if not new:
                return 255
            received = received[-100:] + new
            os.write(1, new.split(b"\0")[0])
    return int(received.split(b"\0")[-2])


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    else:
        sys.exit(agent(sys.argv[2], " ".join(sys.argv[3:])))
