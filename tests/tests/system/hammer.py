"""Writes, and remembers what a crash of the server may leave behind.

    hammer.py run URI STATE SEED    write until the connection breaks; print "acked N" as it goes,
                                    and "marked" when STATE.mark appeared: what is acknowledged
                                    from then on may be lost
    hammer.py check URI STATE       compare with what was acknowledged, remember what is there

Many requests are in flight over several connections, each in a lane of its own, so every sector
has one acknowledged version and at most one that was on its way. Each 512-byte sector holds its
number and its version, over and over; version 0 is zeroes.
"""

import errno
import json
import os
import random
import select
import signal
import sys

import nbd

SECTOR = 512
LANE_SECTORS = 4096
LANES = 16
HANDLES = 4
RUN_SECTORS = 128
LONGEST = 300  # seconds that a run may take


def content(sector, version):
    if version == 0:
        return bytes(SECTOR)
    return (sector.to_bytes(8, "big") + version.to_bytes(8, "big")) * (SECTOR // 16)


class State:
    """For each sector that was ever written: the versions that it may have."""

    def __init__(self, path):
        self.path = path
        self.sectors = {}
        if os.path.exists(path):
            with open(path) as file:
                self.sectors = {int(k): v for k, v in json.load(file).items()}
        self.marked = False
        self.version = max((max(v) for v in self.sectors.values()), default=0)

    def save(self):
        with open(self.path, "w") as file:
            json.dump(self.sectors, file)

    def issue(self, sectors, version):
        for sector in sectors:
            before = self.sectors.get(sector, [0])
            self.sectors[sector] = (before if self.marked else before[:1]) + [version]

    def acknowledge(self, sectors, version):
        if self.marked:
            return
        for sector in sectors:
            self.sectors[sector] = [version]

    def mark(self):
        """From now on nothing that is there before is ruled out by what is acknowledged."""
        if not self.marked and os.path.exists(self.path + ".mark"):
            self.marked = True
            os.remove(self.path + ".mark")
            print("marked", flush=True)


class Lane:
    """One request at a time, in an area of its own."""

    def __init__(self, number, handle):
        self.first = number * LANE_SECTORS
        self.handle = handle
        self.cookie = None

    def start(self, state, rng):
        count = rng.randint(1, rng.choice([8, 8, 16, RUN_SECTORS]))
        begin = self.first + rng.randint(0, LANE_SECTORS - count)
        if rng.random() < 0.5:
            begin -= begin % 8
        self.sectors = range(begin, begin + count)
        at, bytes_ = begin * SECTOR, count * SECTOR
        dice = rng.random()
        if dice < 0.04:
            self.sectors = range(0)
            self.cookie = self.handle.aio_flush()
        elif dice < 0.14:
            self.version = 0
            state.issue(self.sectors, 0)
            flags = nbd.CMD_FLAG_NO_HOLE if dice < 0.09 else 0
            self.cookie = self.handle.aio_zero(bytes_, at, flags=flags)
        else:
            state.version += 1
            self.version = state.version
            state.issue(self.sectors, self.version)
            data = b"".join(content(s, self.version) for s in self.sectors)
            flags = nbd.CMD_FLAG_FUA if dice < 0.20 else 0
            self.buffer = nbd.Buffer.from_bytearray(bytearray(data))
            self.cookie = self.handle.aio_pwrite(self.buffer, at, flags=flags)

    def finish(self, state):
        if self.cookie is None or not self.handle.aio_command_completed(self.cookie):
            return False
        self.cookie = None
        if self.sectors:
            state.acknowledge(self.sectors, self.version)
        return True


def pump(handles):
    poller = select.poll()
    by_fd = {}
    for handle in handles:
        direction = handle.aio_get_direction()
        events = 0
        if direction & nbd.AIO_DIRECTION_READ:
            events |= select.POLLIN
        if direction & nbd.AIO_DIRECTION_WRITE:
            events |= select.POLLOUT
        by_fd[handle.aio_get_fd()] = handle
        poller.register(handle.aio_get_fd(), events)
    for fd, events in poller.poll(60_000):
        handle = by_fd[fd]
        if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
            handle.aio_notify_read()
        elif events & select.POLLOUT:
            handle.aio_notify_write()


def run(uri, state, seed):
    rng = random.Random(seed)
    handles = [nbd.NBD() for _ in range(HANDLES)]
    for handle in handles:
        handle.connect_uri(uri)
    lanes = [Lane(number, handles[number % HANDLES]) for number in range(LANES)]
    acked = 0
    try:
        while True:
            state.mark()
            for lane in lanes:
                if lane.cookie is None:
                    lane.start(state, rng)
            pump(handles)
            for lane in lanes:
                if lane.finish(state):
                    acked += 1
                    if acked % 100 == 0:
                        print("acked", acked, flush=True)
    except nbd.Error as error:
        state.save()
        leaving = error.errnum == errno.ESHUTDOWN
        if not leaving and not any(handle.aio_is_dead() or handle.aio_is_closed() for handle in handles):
            sys.exit(f"a request failed: {error}")


def check(uri, state):
    handle = nbd.NBD()
    handle.connect_uri(uri)
    wrong = 0
    for first in range(0, LANES * LANE_SECTORS, LANE_SECTORS):
        data = handle.pread(LANE_SECTORS * SECTOR, first * SECTOR)
        for i in range(LANE_SECTORS):
            sector = first + i
            allowed = state.sectors.get(sector, [0])
            found = data[i * SECTOR:(i + 1) * SECTOR]
            match = [version for version in allowed if content(sector, version) == found]
            if match:
                state.sectors[sector] = match[:1]
                continue
            wrong += 1
            if wrong <= 10:
                print(f"sector {sector}: {found[:16].hex()} is none of versions {allowed}")
    if wrong:
        sys.exit(f"{wrong} sectors are wrong")
    state.save()


if __name__ == "__main__":
    verb, uri, state = sys.argv[1], sys.argv[2], State(sys.argv[3])
    if verb == "run":
        signal.alarm(LONGEST)
        run(uri, state, int(sys.argv[4]))
    else:
        check(uri, state)
