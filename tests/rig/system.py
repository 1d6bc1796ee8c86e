"""The guest's system: a stock Debian kernel and a few programs, and QEMU to run them.

Debian's packages are downloaded and unpacked below `target/rig`; nothing is installed, and none of
it needs root.
"""

import lzma
import os
import re
import shutil
import subprocess
from pathlib import Path

from archive import Archive

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
HOME = TARGET / "rig"
UNPACKED = HOME / "root"
LIBRARIES = ":".join(f"{UNPACKED}/{lib}/x86_64-linux-gnu" for lib in ("usr/lib", "lib"))
KERNEL = HOME / "vmlinux"
BASE = HOME / "base.cpio"
QEMU = UNPACKED / "usr/bin/qemu-system-x86_64"

# The first of these that there is; each depends on the newest kernel of its kind.
KERNELS = ["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"]
EMULATOR = ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"]
PROGRAMS = ["busybox-static", "nbd-client", "libnl-3-200", "libnl-genl-3-200"]
# Modules with all that they need. Those that are part of the kernel itself are none.
MODULES = "configfs nbd nvme nvmet nvme-loop virtio_blk ext4 xfs crc32c-intel".split()
# Programs of the host that the guest has too.
TOOLS = ["mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair"]

PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
ENVIRONMENT = {**os.environ, "PATH": PATH, "LC_ALL": "C"}


class Failed(Exception):
    """A command or a job has failed; the text says all."""


def output(*command, env=ENVIRONMENT, **options):
    """Runs a command that must succeed; what it printed."""
    done = subprocess.run(command, capture_output=True, env=env, check=False, **options)
    if done.returncode != 0:
        said = (done.stdout + done.stderr).decode(errors="replace")
        raise Failed(f"{' '.join(map(str, command))}: status {done.returncode}\n{said}")
    return done.stdout.decode(errors="replace")


class Apt:
    """Debian's packages, by the machine's lists, or by own ones where those are missing or old."""

    def __init__(self, own_lists):
        self.options = ["-o", "APT::Sandbox::User="]
        if own_lists:
            lists, cache = HOME / "apt/lists", HOME / "apt/cache"
            (lists / "partial").mkdir(parents=True, exist_ok=True)
            (cache / "archives/partial").mkdir(parents=True, exist_ok=True)
            self.options += ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}"]
            output("apt-get", *self.options, "-q", "update")

    def depends(self, packages):
        """The packages that these need first of all. Each start of apt takes a second or two."""
        listed = subprocess.run(
            ["apt-cache", *self.options, "depends", "--important", *packages],
            capture_output=True, env=ENVIRONMENT, check=False,
        ).stdout.decode()
        return re.findall(r"^ *Depends: ([^<:\s]+)$", listed, re.MULTILINE)

    def wanted(self):
        """What has to be downloaded."""
        kernels = self.depends(KERNELS)
        if not kernels:
            raise Failed(f"apt knows none of {', '.join(KERNELS)}")
        direct = {name for name in self.depends(EMULATOR[:1]) if name.startswith("lib")}
        libraries = direct | {name for name in self.depends(direct) if name.startswith("lib")}
        return [kernels[0], *EMULATOR, *PROGRAMS, *sorted(libraries - installed())]

    def download(self, folder):
        """Downloads all of it."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        output("apt-get", *self.options, "-q", "download", *self.wanted(), cwd=folder)


def installed():
    """The packages that the host has."""
    listed = output("dpkg-query", "-W", "-f", "${db:Status-Status} ${Package}\\n")
    return {line.split()[1] for line in listed.splitlines() if line.startswith("installed ")}


def prepare():
    """Downloads and unpacks, unless that was done."""
    done = HOME / "done"
    recipe = Path(__file__).read_text() + (Path(__file__).parent / "guest/init").read_text()
    if done.exists() and done.read_text() == recipe:
        return
    done.unlink(missing_ok=True)
    packages = HOME / "packages"
    try:
        Apt(own_lists=False).download(packages)
    except Failed:
        Apt(own_lists=True).download(packages)
    shutil.rmtree(UNPACKED, ignore_errors=True)
    for package in packages.iterdir():
        output("dpkg-deb", "-x", package, UNPACKED)
    shutil.rmtree(packages)
    extract_kernel()
    make_base()
    done.write_text(recipe)


def extract_kernel():
    """Takes the kernel out of its compressed image: unpacking itself takes an emulated processor
    seconds."""
    image = next((UNPACKED / "boot").glob("vmlinuz-*")).read_bytes()
    for found in re.finditer(rb"\x28\xb5\x2f\xfd", image):
        # What follows in the image is no part of it, which zstd says, after it has done its work.
        command = ["zstd", "-d", "-c", "-q"]
        rest = image[found.start():]
        kernel = subprocess.run(command, input=rest, capture_output=True, check=False).stdout
        if kernel.startswith(b"\x7fELF"):
            KERNEL.write_bytes(kernel)
            return
    KERNEL.write_bytes(image)


def make_base():
    """Makes the part of the guest's system that is the same for all jobs."""
    modules = HOME / "modules"
    shutil.rmtree(modules, ignore_errors=True)
    version = next((UNPACKED / "lib/modules").iterdir()).name
    collect_modules(UNPACKED / "lib/modules" / version, modules / "lib/modules" / version)
    busybox = UNPACKED / "bin/busybox"
    output(busybox, "depmod", "-b", modules, version)
    with BASE.open("wb") as out:
        base = Archive(out)
        base.copy("init", Path(__file__).parent / "guest/init")
        base.copy("bin/busybox", busybox)
        for path in sorted(modules.rglob("*")):
            if path.is_file():
                base.copy(str(path.relative_to(modules)), path, 0o644)
        copied = set()
        search = PATH + f":{UNPACKED}/usr/sbin:{UNPACKED}/sbin"
        for tool in [*TOOLS, "nbd-client"]:
            found = shutil.which(tool, path=search)
            if not found:
                raise Failed(f"{tool} is missing: tests/install rig")
            base.copy(f"usr/sbin/{tool}", Path(found))
            for library in libraries(found) - copied:
                copied.add(library)
                # The loader has a fixed place; it finds the rest in the first folder it looks in.
                folder = "lib64" if "/ld-linux" in library else "lib/x86_64-linux-gnu"
                base.copy(f"{folder}/{Path(library).name}", Path(library))
        base.end()


def libraries(program):
    """The shared libraries that a program needs."""
    listed = output("ldd", program, env={**ENVIRONMENT, "LD_LIBRARY_PATH": LIBRARIES})
    return set(re.findall(r"(/\S+) \(0x", listed))


def collect_modules(source, target):
    """Copies the modules that are wanted, and those they need, uncompressed."""
    known = {}
    for path in source.rglob("*.ko*"):
        known[path.name.partition(".")[0].replace("-", "_")] = path
    waiting = list(MODULES)
    done = set()
    while waiting:
        name = waiting.pop().replace("-", "_")
        if name in done or name not in known:
            continue
        done.add(name)
        path = known[name]
        content = path.read_bytes()
        if path.suffix == ".xz":
            content = lzma.decompress(content)
        place = target / path.relative_to(source).with_name(path.name.removesuffix(".xz"))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        needs = re.search(rb"\0depends=([^\0]*)", content)
        waiting += [need for need in needs[1].decode().split(",") if need] if needs else []
    shutil.copy(source / "modules.builtin", target)
    shutil.copy(source / "modules.order", target)
