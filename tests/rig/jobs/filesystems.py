"""The appliance with an emulated NVMe drive as its cache, and the kernel's NBD client: ext4 and xfs
are made, written to and checked, after crashes too."""

from machine import nvme


def run(rig):
    with rig.machine("filesystems.sh", nvme(rig.folder / "drive", 256 << 20)) as guest:
        rig.say(guest.finish(420))
