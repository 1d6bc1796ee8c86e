"""What is measured, and on whom."""

from dataclasses import dataclass

# In the order in which a round takes them, with what the tables say of each.
PEERS = {
    "raw": "the file itself: fio io_uring with O_DIRECT, no server",
    "nbdkit-memory": "nbdkit's memory plugin: the ceiling for hits in RAM",
    "nbdkit-file": "nbdkit's file plugin: through the page cache",
    "qemu-nbd": "qemu-nbd with O_DIRECT and io_uring, on the same file",
    "heeler": "2 GiB of RAM, so that reads hit in RAM",
    "heeler-1core": "the same, serving on one core and leaving the others to the client",
    "heeler-nvme": "256 MiB of RAM, a quarter of the working set, so that reads hit on NVMe",
}


@dataclass(frozen=True)
class Cell:
    """One load."""

    name: str
    title: str
    rw: str
    bs: str
    depth: int
    # Writes between two flushes; 0 for never.
    flush_every: int = 0

    def flush(self, target):
        """fio's option for it. An NBD flush is what fdatasync is to a file."""
        if not self.flush_every:
            return []
        option = "--fsync" if "--ioengine=nbd" in target else "--fdatasync"
        return [f"{option}={self.flush_every}"]

    def applies(self, peer):
        """With little RAM only reads differ."""
        return peer != "heeler-nvme" or "read" in self.rw

    @property
    def sequential(self):
        return not self.rw.startswith("rand")


CELLS = [
    Cell("read-1", "4 KiB random read, depth 1", "randread", "4k", 1),
    Cell("read-32", "4 KiB random read, depth 32", "randread", "4k", 32),
    Cell("read-seq", "128 KiB sequential read, depth 8", "read", "128k", 8),
    Cell("write-1", "4 KiB random write, depth 1", "randwrite", "4k", 1),
    Cell("write-32", "4 KiB random write, depth 32", "randwrite", "4k", 32),
    Cell("write-1-f1", "4 KiB random write, depth 1, flush after each", "randwrite", "4k", 1, 1),
    Cell("write-1-f32", "4 KiB random write, depth 1, flush every 32", "randwrite", "4k", 1, 32),
    Cell("write-32-f32", "4 KiB random write, depth 32, flush every 32", "randwrite", "4k", 32, 32),
    Cell("write-seq", "128 KiB sequential write, depth 8", "write", "128k", 8),
]


def by_name(cells):
    """The names of the cells."""
    return [cell.name for cell in cells]
