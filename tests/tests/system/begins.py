"""A volume begins with the content of a file.

    begins.py URI FILE             all of it
    begins.py URI FILE failures    what can be read; and some of it cannot
"""

import sys

import nbd

STEP = 1 << 17

handle = nbd.NBD()
handle.connect_uri(sys.argv[1])
failed = 0
with open(sys.argv[2], "rb") as file:
    at = 0
    while part := file.read(STEP):
        try:
            if handle.pread(len(part), at) != part:
                sys.exit(f"the {len(part)} bytes at {at} differ")
        except nbd.Error:
            if sys.argv[3:] != ["failures"]:
                raise
            failed += 1
        at += len(part)
if sys.argv[3:] == ["failures"] and not failed:
    sys.exit("everything could be read")
