"""A guest's ext4 under load, on a volume of the host. Snapshots that are made meanwhile are file
systems as a power cut leaves them: clean once their journal is replayed, and what had been synced
before a snapshot was asked for is in it. So is the volume itself, when the machine is gone and its
server was killed now and then."""

import subprocess

from machine import Failed, nbd_disk
from system import output

SNAPSHOTS = 12
# Claims of the guest from one snapshot to the next one.
STEP = 150
# After these many snapshots the server is killed; the guest waits until it is there again.
KILLS = (4, 8)
PATIENCE = 300
# What a replayed journal may need done: what the kernel would do, too, when it mounts.
REPLAY = ("recovering journal", "orphaned inode", "clean,", "Truncating orphaned", "Clearing orphan")


def run(rig):
    with rig.server("--cache-size", "256M", "--push-after", "2s") as server:
        server.run("volume", "create", "disk0", "--size", "512M")
        server.start()
        with rig.machine("load.sh", nbd_disk(server.socket, "disk0")) as guest:
            claims = load(rig, server, guest)
            guest.kill()
            said = guest.said()
        replayed = 0
        for number, claimed in enumerate(claims):
            name = f"disk0@s{number}"
            server.run("snapshot", "serve", name)
            replayed += examine(rig, server.uri(name), claimed)
        # At most one may have hit a moment of rest.
        if replayed < SNAPSHOTS - 1:
            raise Failed(f"only {replayed} of {SNAPSHOTS} snapshots had a journal to replay")
        examine(rig, server.uri("disk0"), said)
        server.stop()
        server.run("check", "--deep")


def load(rig, server, guest):
    """Makes snapshots while the guest writes; what it had claimed before each was asked for."""
    claims = []
    for number in range(SNAPSHOTS):
        wanted = (guest.said().count("safe ") if claims else 0) + STEP
        guest.wait(lambda said: said.count("safe ") >= wanted, PATIENCE)
        claims.append(guest.said())
        took = rig.timed(server.run, "snapshot", "create", f"disk0@s{number}")
        rig.say(f"snapshot {number} in {took:.2f} s, {claims[-1].count('safe ')} claims before it")
        if number in KILLS:
            server.kill()
            server.start()
    return claims


def examine(rig, uri, claimed):
    """Replays the journal of a copy, looks for damage, and compares the files with what was claimed;
    whether there was a journal to replay."""
    image, files = rig.folder / "image", rig.folder / "files"
    claims = rig.folder / "claims"
    claims.write_text(claimed)
    output("nbdcopy", uri, image)
    features = output("dumpe2fs", "-h", image)
    replayed = "needs_recovery" in features
    done = subprocess.run(["e2fsck", "-p", image], capture_output=True, check=False)
    said = done.stdout.decode() + done.stderr.decode()
    odd = [line for line in said.splitlines() if not any(word in line for word in REPLAY)]
    if done.returncode > 1 or odd:
        raise Failed(f"{uri}: replay, status {done.returncode}\n{said}")
    output("e2fsck", "-f", "-n", image)
    output("rm", "-rf", files)
    files.mkdir()
    output("debugfs", "-R", f"rdump /names /logs /records {files}", image)
    rig.say(output(rig.tool, "files", "check", files, claims).strip())
    return replayed
