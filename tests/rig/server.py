"""The appliance on the host."""

import os
import subprocess
import time

from system import Failed

PATIENCE = 180


class Server:
    """A data directory, and the server that serves it when it runs."""

    def __init__(self, folder, heeler, flags=()):
        self.heeler = heeler
        self.data = folder / "data"
        self.log = folder / "log"
        self.socket = folder / "nbd.sock"
        self.flags = flags
        self.process = None
        self.data.mkdir(parents=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process and self.process.poll() is None:
            self.kill()

    def run(self, *words):
        """Runs a command; what it printed."""
        command = [self.heeler, *words, "--data", self.data]
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
        if done.returncode != 0:
            said = (done.stdout + done.stderr).decode(errors="replace")
            raise Failed(f"heeler {' '.join(words)}: status {done.returncode}\n{said}")
        return done.stdout.decode()

    def start(self):
        """Starts the server, and waits until it is ready."""
        begun = self.log.stat().st_size if self.log.exists() else 0
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
        command = [
            self.heeler, "serve", "--data", self.data, "--listen", f"unix:{self.socket}",
            "--memory", "128M", "--cores", cores, *self.flags,
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + PATIENCE
        while b"ready\n" not in self.log.read_bytes()[begun:]:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"the server is not ready\n{self.log.read_text()[-6000:]}")
            time.sleep(0.05)

    def kill(self):
        """Ends it as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self):
        """Asks it to end, which it must do well."""
        self.process.terminate()
        if self.process.wait(PATIENCE) != 0:
            raise Failed(f"the server did not end well\n{self.log.read_text()[-6000:]}")

    def uri(self, export):
        """A volume or a snapshot, for clients."""
        return f"nbd+unix:///{export}?socket={self.socket}"
