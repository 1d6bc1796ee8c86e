"""Writes stamps from which a cut can be checked.

    cut.py run URI            write until the connection breaks; print "acked N" as it goes
    cut.py check URI          every stamp there is there with all that was acknowledged before it was
                              issued; print how many stamps there are

Each of several threads writes stamps with ascending numbers round and round over slots of its own,
which lie in many objects. A stamp says what was the last acknowledged number of every thread when it
was issued.
"""

import signal
import struct
import sys
import threading

import nbd

THREADS = 4
SLOTS = 64
BLOCK = 4096
LONGEST = 300  # seconds that a run may take
STAMP = struct.Struct("<8sQQ%dQ" % THREADS)
MAGIC = b"stamped!"


def place(thread, number):
    slot = number % SLOTS
    return (slot * THREADS + thread) * (1 << 20) + slot * 3 * BLOCK


def connect(uri):
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


def write(uri, thread, acked, ended):
    handle = connect(uri)
    number = 0
    try:
        while True:
            number += 1
            stamp = STAMP.pack(MAGIC, thread, number, *acked)
            handle.pwrite(stamp.ljust(BLOCK, b"\0"), place(thread, number))
            acked[thread] = number
            if number % 100 == 0:
                # In one piece: others print as well.
                print(f"acked {number}\n", end="", flush=True)
    except (nbd.Error, BrokenPipeError):
        pass
    finally:
        # However this thread ends: what waits for it must not wait for ever.
        ended.set()


def run(uri):
    signal.alarm(LONGEST)
    acked = [0] * THREADS
    ended = threading.Event()
    threads = [
        threading.Thread(target=write, args=(uri, thread, acked, ended), daemon=True)
        for thread in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    ended.wait()


def check(uri):
    handle = connect(uri)
    stamps = []
    for thread in range(THREADS):
        for slot in range(SLOTS):
            bytes = handle.pread(BLOCK, place(thread, slot))
            magic, who, number, *before = STAMP.unpack_from(bytes)
            if magic == MAGIC:
                assert who == thread and number % SLOTS == slot, "a stamp in another's place"
                stamps.append((thread, number, before))
            else:
                assert bytes == b"\0" * BLOCK, "neither a stamp nor zeroes"
    newest = [max([n for t, n, _ in stamps if t == thread], default=0) for thread in range(THREADS)]
    for thread, number, before in stamps:
        for other in range(THREADS):
            assert newest[other] >= before[other], (thread, number, before, newest)
    for thread in range(THREADS):
        there = {n for t, n, _ in stamps if t == thread}
        wanted = range(max(1, newest[thread] - SLOTS + 1), newest[thread] + 1)
        assert there == set(wanted), (thread, newest[thread], sorted(set(wanted) ^ there))
    print(sum(newest))


{"run": run, "check": check}[sys.argv[1]](sys.argv[2])
