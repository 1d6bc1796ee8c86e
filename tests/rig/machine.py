"""A machine that QEMU emulates, without KVM: any machine can run it."""

import os
import subprocess
import time
from pathlib import Path

import system
from archive import Archive
from system import Failed

HERE = Path(__file__).resolve().parent
# Spares an emulated processor work that no job is about.
KERNEL_LINE = (
    "console=ttyS0 quiet panic=-1 oops=panic nowatchdog mitigations=off tsc=reliable"
    " no_timer_check cryptomgr.notests rcupdate.rcu_expedited=1 random.trust_cpu=1"
)


def must_fail(action, *arguments):
    """Does what a job would have to notice."""
    try:
        action(*arguments)
    except Failed:
        return
    raise Failed(f"{action.__name__} has not noticed what was wrong")


class Machine:
    """A guest that runs one script; killed, as by a power cut, at the end of a `with`."""

    def __init__(self, folder, script, programs, devices, memory="1G"):
        """`folder` is for its files, `script` one of `guest/`, `programs` go to the guest's
        /usr/bin, `devices` are arguments of QEMU."""
        folder.mkdir()
        self.folder = folder
        self.job = folder / "job"
        initial = folder / "initrd"
        with initial.open("wb") as out:
            out.write(system.BASE.read_bytes())
            job = Archive(out)
            for part in sorted((HERE / "guest").glob("*.sh")):
                job.copy(f"job/{part.name}", part)
            job.link("job/main", script)
            for program in programs:
                job.copy(f"usr/bin/{program.name}", program)
            job.end()
        data = [system.UNPACKED / "usr/share" / part for part in ("qemu", "seabios")]
        command = [
            system.QEMU, "-L", data[0], "-L", data[1], "-machine", "q35", "-accel", "tcg",
            "-cpu", "max", "-smp", "1", "-m", memory, "-nodefaults", "-no-reboot",
            "-display", "none", "-monitor", "none", "-kernel", system.KERNEL,
            "-initrd", initial, "-append", KERNEL_LINE,
            "-serial", f"file:{folder / 'console'}", "-device", "virtio-serial-pci",
            "-chardev", f"file,id=job,path={self.job}",
            "-device", "virtserialport,chardev=job,name=job", *devices,
        ]
        with (folder / "qemu").open("wb") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, "LD_LIBRARY_PATH": system.LIBRARIES},
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        """Takes the power away."""
        self.process.kill()
        self.process.wait()

    def said(self):
        """What the script has printed so far."""
        return self.job.read_bytes().decode(errors="replace") if self.job.exists() else ""

    def wait(self, condition, patience):
        """Waits until a condition on what the script has printed holds; fails if it ends before."""
        deadline = time.monotonic() + patience
        while not condition(self.said()):
            if self.process.poll() is not None and not condition(self.said()):
                raise Failed(f"the guest has ended early\n{self.report()}")
            if time.monotonic() > deadline:
                raise Failed(f"the guest took longer than {patience} s\n{self.report()}")
            time.sleep(0.1)

    def finish(self, patience):
        """Waits for the end of the script, which must succeed; what it printed."""
        self.wait(lambda said: "the job ended with " in said, patience)
        if not self.said().endswith("the job ended with 0\n"):
            raise Failed(self.report())
        return self.said()

    def report(self):
        """The end of all that the machine has said."""
        parts = []
        for name in ("console", "qemu", "job"):
            path = self.folder / name
            if path.exists():
                parts.append(f"--- {name}\n{path.read_bytes()[-6000:].decode(errors='replace')}")
        return "\n".join(parts)


def nvme(path, size, serial="rig"):
    """An NVMe controller with a namespace on a file, which is made."""
    with path.open("wb") as file:
        file.truncate(size)
    return [
        "-drive", f"file={path},if=none,id={serial},format=raw,cache=writeback,aio=threads",
        "-device", f"nvme,serial={serial},drive={serial},max_ioqpairs=8",
    ]


def nbd_disk(socket, export):
    """A virtio disk that is an export of a server on the host. QEMU waits for a server that goes
    away."""
    drive = (
        f"driver=nbd,node-name=disk,server.type=unix,server.path={socket},export={export},"
        "reconnect-delay=120,discard=unmap,cache.direct=on"
    )
    return ["-blockdev", drive, "-device", "virtio-blk-pci,drive=disk,romfile="]
