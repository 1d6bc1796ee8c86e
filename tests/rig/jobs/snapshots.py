"""A guest's ext4 under load, on a volume of the host. Snapshots that are made meanwhile are file
systems as a power cut leaves them: clean once their journal is replayed, and what had been synced
before a snapshot was asked for is in it. So is the volume itself, when the machine is gone and its
server was killed now and then."""

import subprocess

from machine import must_fail, nbd_disk
from system import Failed, output

SNAPSHOTS = 12
# Claims of the guest from one snapshot to the next one.
STEP = 150
# After these many snapshots the server is killed; the guest waits until it is there again.
KILLS = (4, 8)
PATIENCE = 300
# What a replayed journal may need done: what the kernel would do, too, when it mounts.
REPLAY = ("recovering journal", "orphaned inode", "clean,", "Clearing orphan")


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
            replayed += examine(rig, copy(rig, server.uri(name)), claimed)
        # At most one may have hit a moment of rest.
        if replayed < SNAPSHOTS - 1:
            raise Failed(f"only {replayed} of {SNAPSHOTS} snapshots had a journal to replay")
        examine(rig, copy(rig, server.uri("disk0")), said)
        # A test of this test: what is no cut is found.
        must_fail(examine_mixtures, rig, server, claims[3])
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


def copy(rig, uri, name="image"):
    """Copies an export into a file."""
    image = rig.folder / name
    output("nbdcopy", uri, image)
    return image


def examine_mixtures(rig, server, claimed):
    """Examines copies that are partly of one snapshot and partly of a later one. Where the file
    system has put what would show it is chance: so there are several."""
    for piece in (1 << 22, 1 << 23, 1 << 24):
        older = copy(rig, server.uri("disk0@s3"), "older")
        mixed = copy(rig, server.uri("disk0@s9"))
        with older.open("rb") as source, mixed.open("r+b") as target:
            for offset in range(0, mixed.stat().st_size, 2 * piece):
                source.seek(offset)
                target.seek(offset)
                target.write(source.read(piece))
        examine(rig, mixed, claimed)


def examine(rig, image, claimed):
    """Replays the journal of a copy, looks for damage, and compares the files with what was
    claimed; whether there was a journal to replay."""
    files, claims = rig.folder / "files", rig.folder / "claims"
    claims.write_text(claimed)
    features = output("dumpe2fs", "-h", image)
    replayed = "needs_recovery" in features
    done = subprocess.run(["e2fsck", "-p", image], capture_output=True, check=False)
    said = done.stdout.decode() + done.stderr.decode()
    odd = [line for line in said.splitlines() if not any(word in line for word in REPLAY)]
    if done.returncode > 1 or odd:
        raise Failed(f"e2fsck -p: status {done.returncode}\n{said}")
    output("e2fsck", "-f", "-n", image)
    output("rm", "-rf", files)
    files.mkdir()
    kept = " ".join(["/names", "/logs", *(f"/records-{number}" for number in range(8))])
    output("debugfs", "-R", f"rdump {kept} {files}", image)
    rig.say(output(rig.tool, "files", "check", files, claims).strip())
    return replayed
