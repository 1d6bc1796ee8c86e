"""Makes RESULTS.md of a run."""

import os
import platform
import shlex
import subprocess
from pathlib import Path
from statistics import median

from cells import CELLS, PEERS

# Seen earlier on such a machine; they need software that Debian does not have.
ELSEWHERE = """\
| | read-32 IOPS | write-32 IOPS | |
|---|---:|---:|---|
| LSVD | 66 000 | 71 000 | in-process (fio's rbd engine), its flush does nothing; objects in Ceph |
| ZeroFS | 1 500 | 400 | NBD; objects in Ceph through its S3 gateway |
"""


class Results:
    """Medians and ranges of samples."""

    def __init__(self, samples):
        self.samples = samples

    def values(self, peer, cell, field):
        return [sample[field] for sample in self.samples.get((peer, cell), [])]

    def median(self, peer, cell, field):
        values = self.values(peer, cell, field)
        return median(values) if values and values[0] is not None else None

    def noisy(self, peer, cell):
        return any(self.values(peer, cell, "noisy"))

    def peers(self):
        return [peer for peer in PEERS if any(peer == of for of, _ in self.samples)]

    def cells(self):
        return [cell for cell in CELLS if any(cell.name == of for _, of in self.samples)]


def number(value, digits=0):
    """With a thin grouping: 12 345."""
    return "-" if value is None else f"{value:,.{digits}f}".replace(",", " ")


def table(head, rows):
    """A table whose columns, but for the first, are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def overview(results):
    cells = results.cells()
    rows = []
    for peer in results.peers():
        row = [peer]
        for cell in cells:
            field = "mib" if cell.sequential else "iops"
            value = number(results.median(peer, cell.name, field))
            row.append(value + (" *" if results.noisy(peer, cell.name) else ""))
        rows.append(row)
    head = [""] + [cell.name for cell in cells]
    return table(head, rows)


def ratios(results, base):
    cells = results.cells()
    rows = []
    for peer in results.peers():
        if peer == base:
            continue
        row = [peer]
        for cell in cells:
            own = results.median(peer, cell.name, "iops")
            other = results.median(base, cell.name, "iops")
            row.append("-" if own is None or other is None else f"{own / other:.2f}")
        rows.append(row)
    return table([f"against {base}"] + [cell.name for cell in cells], rows)


def details(results):
    parts = []
    head = ["", "IOPS", "min-max", "MiB/s", "mean us", "p99 us", "server CPU us", "others' cores"]
    for cell in results.cells():
        rows = []
        for peer in results.peers():
            values = results.values(peer, cell.name, "iops")
            if not values:
                continue
            mark = " noisy" if results.noisy(peer, cell.name) else ""
            others = max(results.values(peer, cell.name, "other_cores"))
            rows.append([
                peer, number(median(values)), f"{number(min(values))}-{number(max(values))}",
                number(results.median(peer, cell.name, "mib")),
                number(results.median(peer, cell.name, "mean_us")),
                number(results.median(peer, cell.name, "p99_us")),
                number(results.median(peer, cell.name, "cpu_us"), 1), f"{others:.2f}{mark}",
            ])
        parts.append(f"### {cell.name}: {cell.title}\n\n{table(head, rows)}")
    return "\n".join(parts)


def aims(results):
    """Each aim with what was found. An aim whose figures were not taken is left out."""
    rows = []

    def row(what, cell, field, own, other, factor, digits=0):
        ours = results.median(own, cell, field)
        theirs = results.median(other, cell, field)
        if ours is None or theirs is None:
            return
        most = field == "cpu_us"
        bound = theirs * factor
        met = ours <= bound if most else ours >= bound
        limit = f"{'at most' if most else 'at least'} {number(bound, digits)}"
        rows.append([what, cell, limit, number(ours, digits), "met" if met else "**missed**"])

    for cell in ("read-1", "read-32"):
        row("hit in RAM: server CPU us per request, no more than nbdkit-memory's", cell, "cpu_us",
            "heeler", "nbdkit-memory", 1, 1)
    for cell in ("write-1", "write-32", "write-1-f1", "write-1-f32", "write-32-f32"):
        row("random write: IOPS as of the raw file", cell, "iops", "heeler", "raw", 1)
    for cell in ("read-1", "read-32", "read-seq"):
        row("hit on NVMe: 0.8 of the raw file's IOPS", cell, "iops", "heeler-nvme", "raw", 0.8)
    return section("Aims", table(["aim", "cell", "bound", "heeler", ""], rows) if rows else "")


def hits(bench):
    """Where heeler's reads were found, in percent."""
    rows = []
    for (peer, cell), info in bench.cache_info.items():
        total = info["read_bytes"]
        if not total:
            continue
        share = [info[name] / total for name in
                 ("read_ram_bytes", "read_nvme_bytes", "fetched_bytes")]
        rows.append([f"{peer} {cell}"] + [f"{100 * part:.1f}" for part in share])
    found = table(["% of bytes read", "in RAM", "on NVMe", "from the store"], rows)
    return f"Where heeler found what was read, in the last round:\n\n{found}\n" if rows else ""


def starts(recoveries):
    if not recoveries:
        return ""
    rows = []
    for name, field in (("empty", "clean_seconds"), ("after kill -9", "seconds")):
        values = [recovery[field] for recovery in recoveries]
        rows.append([name, f"{median(values):.2f}", f"{min(values):.2f}-{max(values):.2f}"])
    sizes = ", ".join(
        f"{r['dirty'] >> 20} MiB dirty at the kill, {r['found'] >> 20} MiB found"
        for r in recoveries)
    text = ("From the start of the process until a client has opened the volume.\n\n"
            + table(["cache of 4 GiB", "seconds", "min-max"], rows))
    return section("Start", f"{text}\n{sizes}.\n")


def section(title, text):
    """Nothing without a text."""
    return f"## {title}\n\n{text}\n" if text else ""


def first_line(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines()[0].strip() if done.stdout else "?"


def machine(directory):
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text()
                .splitlines() if line.startswith("model name")), platform.machine())
    memory = round(int(Path("/proc/meminfo").read_text().split()[1]) / (1 << 20))
    mount = first_line("findmnt", "-no", "SOURCE,FSTYPE,OPTIONS", "-T", str(directory))
    source, _, rest = mount.partition(" ")
    disk = first_line("lsblk", "-dno", "SIZE", source)
    guest = ", a virtual machine" if "hypervisor" in Path("/proc/cpuinfo").read_text() else ""
    return "\n".join([
        f"* {os.cpu_count()} x {cpu}, {memory} GiB of RAM{guest}",
        f"* Linux {platform.release()}",
        f"* {source} ({disk}), {' '.join(rest.split())}",
        f"* {first_line('fio', '--version')}, {first_line('nbdkit', '--version')}, "
        f"{first_line('qemu-nbd', '--version').partition('(')[0].strip()}",
    ])


def commands(bench):
    """What was run, with the working directory and the binary by short names."""
    def short(command):
        text = shlex.join(command).replace(str(bench.options.heeler), "heeler")
        return text.replace(str(bench.dir), "$DIR")

    lines = [f"# {peer}\n{short(command)}" for peer, command in bench.commands.items()
             if isinstance(peer, str)]
    for cell in CELLS:
        for peer in ("raw", "nbdkit-memory"):
            command = bench.commands.get((peer, cell.name))
            if command:
                lines.append(f"# {cell.name}, {'file' if peer == 'raw' else 'each server'}\n"
                             f"{short(command)}")
    wrapped = []
    for line in "\n".join(lines).splitlines():
        while len(line) > 130:
            cut = line.rindex(" ", 0, 130)
            wrapped.append(line[:cut] + " \\")
            line = "    " + line[cut + 1:]
        wrapped.append(line)
    return "```sh\n" + "\n".join(wrapped) + "\n```\n"


def document(bench, recoveries):
    """The whole of RESULTS.md."""
    results = Results(bench.samples)
    peers = "\n".join(f"* `{peer}`: {PEERS[peer]}" for peer in results.peers())
    count = bench.options.runs
    rounds = f"{count} rounds" if count > 1 else "1 round"
    extra = f" heeler ran with `{bench.options.heeler_args}`." if bench.options.heeler_args else ""
    return f"""\
# Measurements

Written by `tests/benches/run` (`make bench`). All figures are of one run on one machine: medians of
{rounds}; a round starts each server in turn and takes every cell of it.{extra}

{machine(bench.dir)}

{peers}

Random cells in IOPS, sequential ones in MiB/s; `*` marks a noisy cell: others used more than 0.3 of
a core.

{overview(results)}
{ratios(results, "raw")}
{ratios(results, "nbdkit-memory")}
{aims(results)}\
## How it was taken

Every server keeps a working set of 1 GiB, written and read once before the first cell, on the same
ext4. One connection over a Unix socket. A cell is {bench.seconds:g} s of fio after 0.5 s of ramp.
Server CPU is utime and stime of the server's process, all threads, over the middle of that time,
for each read or write; flushes are not counted as requests, and latencies are of reads and writes
without them. Others' cores: what was busy besides fio and the server, the kernel's own threads
included; the highest of the rounds.

heeler has a cache file of 8 GiB and its store in a directory beside it. Pushing is kept out of the
cells: everything is pushed before each (`heeler cache flush`, then sync), a cell ends before the
5 s after which a push starts, and the working set is half of the dirty data that starts one early.
The same volume is then served with little RAM, for the NVMe cells.

On a file, flush is fdatasync. The disk of a virtual machine may be faster at writing and flushing
than a real NVMe device: ratios within this run tell more than figures.

{hits(bench)}\
{starts(recoveries)}\
## Others, not taken in this run

{ELSEWHERE}
## Each cell

{details(results)}
## Commands

{commands(bench)}"""
