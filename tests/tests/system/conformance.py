"""The protocol, by libnbd and by hand.

    conformance.py URI SOCKET EXPORT
"""

import errno
import socket
import struct
import sys

import nbd

MIB = 1 << 20
OPT_MAGIC = b"IHAVEOPT"
REP_MAGIC = 0x3E889045565A9
REP_ACK, REP_ERR_UNSUP, REP_ERR_INVALID, REP_ERR_UNKNOWN = 1, 0x80000001, 0x80000003, 0x80000006
REQUEST_MAGIC, SIMPLE_MAGIC, CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668E33EF


def connect(uri, structured=True, contexts=("base:allocation",)):
    handle = nbd.NBD()
    handle.set_request_structured_replies(structured)
    for context in contexts if structured else ():
        handle.add_meta_context(context)
    handle.connect_uri(uri)
    return handle


def fails(code, call, *args, **kwargs):
    """The call fails with this error (or one of these), and the connection goes on."""
    codes = code if isinstance(code, tuple) else (code,)
    try:
        call(*args, **kwargs)
    except nbd.Error as error:
        assert error.errnum in codes, f"{error.string}: errno {error.errnum}, not {codes}"
    else:
        raise AssertionError(f"{call.__name__}{args} did not fail")


def data_and_status(uri):
    handle = connect(uri)
    size = handle.get_size()
    pattern = bytes(range(1, 256)) * 4113
    pattern = pattern[:MIB]
    for at, count in [(0, MIB), (1, 511), (4095, 2), (MIB - 1, 4098), (size - 513, 513)]:
        handle.pwrite(pattern[:count], at)
        assert handle.pread(count, at) == pattern[:count], f"{count} bytes at {at}"
    handle.zero(3 * MIB, MIB * 2)
    handle.pwrite(pattern, 3 * MIB, nbd.CMD_FLAG_FUA)
    extents = []
    handle.block_status(
        3 * MIB, 2 * MIB, lambda context, offset, entries, error: extents.extend(entries)
    )
    assert sum(extents[0::2]) >= MIB, extents
    at = 2 * MIB
    for length, flags in zip(extents[0::2], extents[1::2]):
        middle = at + length // 2
        if at <= middle < 5 * MIB:
            written = 3 * MIB <= middle < 4 * MIB
            assert written == (flags & nbd.STATE_ZERO == 0), (at, length, flags)
        at += length
    one = []
    handle.block_status(
        MIB, 3 * MIB, lambda context, offset, entries, error: one.extend(entries),
        flags=nbd.CMD_FLAG_REQ_ONE,
    )
    assert len(one) == 2 and one[0] <= MIB, one
    handle.trim(MIB, 3 * MIB)
    handle.zero(4096 * 3 + 17, 3 * MIB + 100, nbd.CMD_FLAG_NO_HOLE)
    assert handle.pread(4096 * 3 + 17, 3 * MIB + 100) == bytes(4096 * 3 + 17)
    handle.cache(MIB, 0)
    handle.flush()
    chunks = []
    whole = handle.pread_structured(
        MIB, 0, lambda data, offset, status, error: chunks.append(len(data)), nbd.CMD_FLAG_DF
    )
    assert whole[:1] == pattern[:1] and chunks == [MIB], chunks
    # A fast zero is either done or refused at once.
    try:
        handle.zero(MIB, 8 * MIB, nbd.CMD_FLAG_FAST_ZERO)
    except nbd.Error as error:
        assert error.errnum in (errno.ENOTSUP, errno.EOPNOTSUPP), error
    handle.shutdown()


def big_and_empty(uri):
    handle = connect(uri)
    block = b"0123456789abcdef" * (32 * MIB // 16)
    handle.pwrite(block, 40 * MIB + 7)
    assert handle.pread(len(block), 40 * MIB + 7) == block
    handle.zero(32 * MIB, 40 * MIB)
    assert handle.pread(7, 72 * MIB) == block[-7:]
    handle.zero(40 * MIB, 40 * MIB)
    assert handle.pread(32 * MIB, 40 * MIB + 7) == bytes(32 * MIB)
    handle.shutdown()


def out_of_bounds(uri):
    for structured in (True, False):
        handle = connect(uri, structured)
        handle.set_strict_mode(0)
        size = handle.get_size()
        full = (errno.ENOSPC, errno.EINVAL)
        fails(errno.EINVAL, handle.pread, 2, size - 1)
        fails(full, handle.pwrite, b"xx", size - 1)
        fails(full, handle.pwrite, b"xx", 1 << 62)
        fails(full, handle.zero, 4096, size)
        fails((errno.EINVAL, errno.ENOSPC), handle.trim, 2, size - 1)
        fails(errno.EINVAL, handle.pread, 1, (1 << 63) - 1)
        assert len(handle.pread(512, size - 512)) == 512
        handle.shutdown()


def without_structured_replies(uri):
    handle = connect(uri, structured=False)
    assert not handle.get_structured_replies_negotiated()
    handle.pwrite(b"simple" * 1000, 9 * MIB + 3)
    assert handle.pread(6000, 9 * MIB + 3) == b"simple" * 1000
    handle.flush()
    handle.shutdown()


def many_connections(uri):
    handles = [connect(uri) for _ in range(8)]
    assert all(handle.can_multi_conn() for handle in handles)
    for i, handle in enumerate(handles):
        handle.pwrite(bytes([i + 1]) * 70_000, 10 * MIB + i * 70_000)
    handles[3].flush()
    for i in range(8):
        other = handles[(i + 5) % 8]
        assert other.pread(70_000, 10 * MIB + i * 70_000) == bytes([i + 1]) * 70_000
    for handle in handles:
        handle.shutdown()


def options(uri, export):
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    names = []
    handle.opt_list(lambda name, description: names.append(name))
    assert export in names, names
    handle.set_export_name("no such volume")
    fails((errno.ENOENT, errno.EINVAL), handle.opt_info)
    fails((errno.ENOENT, errno.EINVAL), handle.opt_go)
    contexts = []
    handle.set_export_name(export)
    handle.opt_list_meta_context(contexts.append)
    assert contexts == ["base:allocation"], contexts
    handle.opt_info()
    assert handle.get_block_size(nbd.SIZE_MAXIMUM) == 32 * MIB
    assert handle.get_block_size(nbd.SIZE_PREFERRED) >= 4096
    handle.opt_go()
    assert len(handle.pread(1, 0)) == 1
    handle.shutdown()
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    handle.opt_abort()


class Raw:
    """A connection after the greeting, spoken to by hand."""

    def __init__(self, path, client_flags=3):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(path)
        greeting = self.read(18)
        assert greeting[:16] == b"NBDMAGIC" + OPT_MAGIC, greeting
        assert struct.unpack(">H", greeting[16:])[0] & 3 == 3, greeting
        if client_flags is not None:
            self.send(struct.pack(">I", client_flags))

    def send(self, data):
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def read(self, count):
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def ends(self):
        """The server hangs up, whatever it says before."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionResetError:
            pass
        self.socket.close()

    def option(self, number, data=b""):
        self.send(OPT_MAGIC + struct.pack(">II", number, len(data)) + data)

    def option_reply(self):
        magic, option, kind, length = struct.unpack(">QIII", self.read(20))
        assert magic == REP_MAGIC, hex(magic)
        return option, kind, self.read(length)

    def go(self, export):
        name = export.encode()
        self.option(7, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
        while True:
            _, kind, data = self.option_reply()
            if kind == REP_ACK:
                return
            assert kind == 3, (hex(kind), data)

    def request(self, command, offset, length, flags=0, cookie=b"12345678", data=b""):
        head = struct.pack(">IHH", REQUEST_MAGIC, flags, command) + cookie
        self.send(head + struct.pack(">QI", offset, length) + data)

    def simple_reply(self, cookie=b"12345678"):
        magic, error = struct.unpack(">II", self.read(8))
        assert magic == SIMPLE_MAGIC and self.read(8) == cookie
        return error


def by_hand(path, export):
    # Options that nobody knows are refused, one after the other.
    raw = Raw(path)
    for number in (99, 0, 0xFFFFFFFF):
        raw.option(number, b"some data")
        option, kind, _ = raw.option_reply()
        assert (option, kind) == (number, REP_ERR_UNSUP), hex(kind)
    # Ones that are known, with data that makes no sense.
    for number, data in [
        (3, b"x"), (6, b""), (7, b"\xff\xff\xff\xffname\x00\x00"), (7, b"\x00\x00\x00\x00"),
        (8, b"x"), (10, b"\x00\x00\x00\x05disk"), (6, struct.pack(">I", 5) + b"disk0\x00\x09"),
    ]:
        raw.option(number, data)
        _, kind, _ = raw.option_reply()
        assert kind & 0x80000000, (number, data, hex(kind))
    raw.go(export)
    # Requests that make no sense get an error; the connection goes on.
    for command, flags, length in [(77, 0, 0), (0, 0x8000, 512), (0, 0, 0xFFFFFFFF), (3, 0x4, 0)]:
        raw.request(command, 0, length, flags)
        assert raw.simple_reply() == errno.EINVAL, (command, flags, length)
    raw.request(0, 0, 16)
    assert raw.simple_reply() == 0 and len(raw.read(16)) == 16
    # Several at once, the last one without an answer.
    raw.request(1, 12 * MIB, 3, data=b"abc", cookie=b"aaaaaaaa")
    assert raw.simple_reply(b"aaaaaaaa") == 0
    raw.request(0, 12 * MIB, 3, cookie=b"bbbbbbbb")
    assert raw.simple_reply(b"bbbbbbbb") == 0 and raw.read(3) == b"abc"
    raw.request(2, 0, 0)
    raw.ends()


def hang_ups(path, export):
    for garbage in (b"\x00" * 64, b"\xff" * 4096, b"GET / HTTP/1.1\r\n\r\n"):
        raw = Raw(path, None)
        raw.send(garbage)
        raw.socket.shutdown(socket.SHUT_WR)
        raw.ends()
    # An option longer than any: an error or a hang-up, but never that much memory.
    raw = Raw(path)
    raw.send(OPT_MAGIC + struct.pack(">II", 7, 0xFFFFFFF0) + b"x" * 100)
    raw.socket.shutdown(socket.SHUT_WR)
    raw.ends()
    # A request with a wrong magic.
    raw = Raw(path)
    raw.go(export)
    raw.send(b"\xde\xad\xbe\xef" * 7)
    raw.ends()
    # A write of more than the server takes: it cannot find the next request.
    raw = Raw(path)
    raw.go(export)
    raw.request(1, 0, 0xFFFFFFFF)
    raw.socket.shutdown(socket.SHUT_WR)
    raw.ends()
    # A client that goes away in the middle of a write, and one that never reads.
    raw = Raw(path)
    raw.go(export)
    raw.request(1, 13 * MIB, 1 * MIB, data=b"z" * 5000)
    raw.socket.close()
    raw = Raw(path)
    raw.go(export)
    for _ in range(64):
        raw.request(0, 0, MIB)
    raw.socket.close()
    # The oldest way to open an export, without the 124 zero bytes.
    raw = Raw(path)
    raw.option(1, export.encode())
    size, flags = struct.unpack(">QH", raw.read(10))
    assert size > 0 and flags & 1
    raw.request(3, 0, 0)
    assert raw.simple_reply() == 0
    raw.request(2, 0, 0)
    raw.ends()


def main():
    uri, path, export = sys.argv[1:]
    for test in (
        data_and_status, big_and_empty, out_of_bounds, without_structured_replies, many_connections
    ):
        print(test.__name__, flush=True)
        test(uri)
    print("options, by_hand, hang_ups", flush=True)
    options(uri, export)
    by_hand(path, export)
    hang_ups(path, export)
    # After all that it still serves.
    assert len(connect(uri).pread(512, 0)) == 512


if __name__ == "__main__":
    main()
