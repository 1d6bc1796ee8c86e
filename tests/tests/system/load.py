"""Requests of a kind from the NUMBERth on, COUNT of them: URI KIND BYTES NUMBER COUNT.

The same arguments make the same requests in the same order; eight are on their way at a time.
"""

import bisect
import itertools
import random
import sys

import nbd

BLOCK = 4096
DEPTH = 8
ROUND = 20000


def zipf(blocks, exponent, seed):
    """Blocks by Zipf's law, spread over all."""
    sums = list(itertools.accumulate((rank + 1) ** -exponent for rank in range(blocks)))
    places = list(range(blocks))
    random.Random(1).shuffle(places)
    dice = random.Random(seed)
    while True:
        yield places[bisect.bisect(sums, dice.random() * sums[-1])]


def requests(kind, blocks):
    """Pairs of a block and how many are read from there; of one that is written, -1."""
    if kind == "loop":
        # Mostly even, the same round again and again: what is best to keep is hard to say.
        once = list(itertools.islice(zipf(blocks, 0.3, 2), ROUND))
        while True:
            yield from ((block, 1) for block in once)
    places = zipf(blocks, 0.9, 3)
    dice = random.Random(4)
    stream = itertools.cycle(range(0, blocks - 7, 8))
    while True:
        share = dice.random() if kind == "mixed" else 1
        if share < 0.03:
            yield next(stream), 8
        else:
            yield next(places), -1 if share < 0.3 else 1


def main():
    uri, kind, size, number, count = sys.argv[1:]
    number = int(number)
    handle = nbd.NBD()
    handle.connect_uri(uri)
    data = nbd.Buffer.from_bytearray(bytearray(random.Random(5).randbytes(BLOCK)))
    all_of_them = requests(kind, int(size) // BLOCK)
    for block, length in itertools.islice(all_of_them, number, number + int(count)):
        while handle.aio_in_flight() >= DEPTH:
            handle.poll(-1)
        if length < 0:
            handle.aio_pwrite(data, block * BLOCK, lambda _: 1)
        else:
            handle.aio_pread(nbd.Buffer(length * BLOCK), block * BLOCK, lambda _: 1)
    while handle.aio_in_flight() > 0:
        handle.poll(-1)
    handle.flush()
    handle.shutdown()


main()
