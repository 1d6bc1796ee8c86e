"""Tries a block of an export, on one connection, again and again, and says how that ends when it
changes: "write ok read ok", or the names of the errors.

    edge.py URI OFFSET
"""

import signal
import sys
import time

import nbd

LONGEST = 300  # seconds that a run may take
PAUSE = 0.01
BLOCK = 4096


def outcome(request):
    try:
        request()
        return "ok"
    except nbd.Error as error:
        return error.errno


signal.alarm(LONGEST)
uri, offset = sys.argv[1], int(sys.argv[2])
handle = nbd.NBD()
handle.connect_uri(uri)
said = None
while True:
    write = outcome(lambda: handle.pwrite(b"e" * BLOCK, offset))
    read = outcome(lambda: handle.pread(BLOCK, offset))
    says = f"write {write} read {read}"
    if says != said:
        print(says, flush=True)
        said = says
    time.sleep(PAUSE)
