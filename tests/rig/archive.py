"""Initial file systems for a kernel: cpio archives, which may follow each other."""

import stat

FILE, FOLDER, LINK = stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK


class Archive:
    """An archive that is written member by member."""

    def __init__(self, out):
        self.out = out
        self.folders = {""}
        self.members = 0

    def file(self, path, content, mode=0o755):
        """Adds a file with this content."""
        self._member(path, FILE | mode, content)

    def copy(self, path, source, mode=0o755):
        """Adds a copy of a file of the host."""
        self.file(path, source.read_bytes(), mode)

    def link(self, path, target):
        """Adds a symbolic link."""
        self._member(path, LINK | 0o777, target.encode())

    def folder(self, path):
        """Adds a folder, and those it lies in, unless they are there."""
        if path not in self.folders:
            self.folders.add(path)
            self._member(path, FOLDER | 0o755, b"")

    def end(self):
        """Ends the archive; nothing can follow but another one."""
        self._write("TRAILER!!!", 0, b"")

    def _member(self, path, mode, content):
        path = path.strip("/")
        self.folder(path.rpartition("/")[0])
        self._write(path, mode, content)

    def _write(self, path, mode, content):
        self.members += 1
        name = path.encode() + b"\0"
        # Inode, mode, owner, group, links, time, bytes, device and the device it is (twice two
        # numbers), bytes of the name, checksum.
        numbers = [self.members, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0]
        header = b"070701" + b"".join(b"%08X" % number for number in numbers)
        self.out.write(self._padded(header + name) + self._padded(content))

    @staticmethod
    def _padded(part):
        return part + bytes(-len(part) % 4)
