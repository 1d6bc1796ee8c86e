"""Power cuts of the drive under the appliance: everything that was flushed is there, every time."""


def run(rig):
    with rig.machine("power.sh", []) as guest:
        rig.say(guest.finish(420))
