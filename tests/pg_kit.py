"""A real PostgreSQL with pgvector, as the package `pgserver` brings it, on a port of loopback."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import psycopg

USER = "keeper"
PASSWORD = "not/for@the:log"
#: becomes another user, then the program. `subprocess` with a user of its own forks where it otherwise does not, and a
#: fork ends the threads of OpenBLAS: a product that another thread is in the middle of then spins for ever
_BECOME = (
    "import os, sys; os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[1])); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)


class Postgres:
    """One server with its own data, which can crash, freeze and come back."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hybrid-pg-"))
        self.folder.chmod(0o755)
        self._bin = _programs(self.folder)
        self._as: list[str] = []
        data = self.folder / "data"
        data.mkdir(mode=0o700)
        if os.geteuid() == 0:  # which the server refuses to run as
            nobody = pwd.getpwnam("nobody")
            os.chown(data, nobody.pw_uid, nobody.pw_gid)
            self._as = [sys.executable, "-c", _BECOME, str(nobody.pw_uid), str(nobody.pw_gid)]
        secret = self.folder / "password"
        secret.write_text(PASSWORD + "\n")
        flags = ["-U", USER, "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync", "-E", "UTF8", "--locale=C"]
        made = subprocess.run(
            [*self._as, self._bin / "initdb", "-D", data, *flags], cwd=self.folder, capture_output=True, text=True
        )
        assert made.returncode == 0, made.stdout + made.stderr
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"postgresql://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/postgres?connect_timeout=2"
        self.start()

    def start(self) -> None:
        """Starts the server, as it was left, and waits until it answers."""
        settings = ("listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off", "shared_buffers=32MB")
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self._as, self._bin / "postgres", "-D", self.folder / "data", "-p", str(self.port)]
                + [word for setting in settings for word in ("-c", setting)],
                cwd=self.folder, stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.run("SELECT 1") and None
            except psycopg.OperationalError:
                ended = self.process.poll() is not None or time.monotonic() > deadline
                assert not ended, (self.folder / "log").read_text()[-4000:]
                time.sleep(0.05)

    def run(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """What a statement returns."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def tables(self) -> set[str]:
        """The tables that hold vectors."""
        found = self.run("SELECT tablename FROM pg_tables WHERE tablename ~ '^hybrid_[0-9a-f]{16}$'")
        return {name for (name,) in found}

    def crash(self) -> None:
        """Ends it at once, in the middle of whatever it does."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(30)

    def freeze(self) -> None:
        """Every process of it stands still; its sockets stay open."""
        for process in self._processes():
            process.suspend()

    def thaw(self) -> None:
        for process in self._processes():
            process.resume()

    def remove(self) -> None:
        """Stops the server and takes its data away."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)
        shutil.rmtree(self.folder)

    def _processes(self) -> list[psutil.Process]:
        main = psutil.Process(self.process.pid)
        return [main, *main.children(recursive=True)]


def _programs(folder: Path) -> Path:
    """The folder of the server's programs; a copy where another user must run them and may not reach the package."""
    found = importlib.util.find_spec("pgserver")
    assert found is not None, "the package pgserver is missing; install the extra `dev`"
    assert found.origin is not None
    package = Path(found.origin).parent
    if os.geteuid() != 0:
        return package / "pginstall" / "bin"
    place = folder / "pgserver" / "pginstall"
    shutil.copytree(package / "pginstall", place, ignore=shutil.ignore_patterns("include"))
    shutil.copytree(package.with_name("pgserver.libs"), folder / "pgserver.libs")
    return place / "bin"
