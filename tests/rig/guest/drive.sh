# An NVMe drive with a volatile cache and a power switch, inside the guest: rig-tool's disk, which
# forgets what was not flushed, behind the kernel's own NVMe target and its loop transport. They
# pass flush and FUA on; the controller that QEMU emulates does not pass FUA on.

target=/sys/kernel/config/nvmet/subsystems/drive
port=/sys/kernel/config/nvmet/ports/1

# Makes the drive, of these many bytes, and switches it on; $drive is its device.
make_drive() {
    modprobe nbd
    modprobe nvmet
    modprobe nvme-loop
    truncate -s "$1" /tmp/drive.img
    disk_on 40
    mkdir $target $target/namespaces/1 $port
    echo 1 >$target/attr_allow_any_host
    printf /dev/nbd15 >$target/namespaces/1/device_path
    echo 1 >$target/namespaces/1/enable
    echo loop >$port/addr_trtype
    ln -s $target $port/subsystems/drive
    echo transport=loop,nqn=drive >/dev/nvme-fabrics
    await find_drive
    find_drive
}

find_drive() {
    local controller
    for controller in /sys/class/nvme/nvme*; do
        [ "$(cat "$controller/transport")" != loop ] || drive=/dev/${controller##*/}n1
    done
    [ -b "${drive:-}" ]
}

# Starts the disk, of whose sectors so many of 100 do not stay in its cache; `lying` makes it one
# that takes no notice of flush and FUA.
disk_on() {
    rm -f /tmp/drive.sock
    seed=$(cut -d' ' -f1 /proc/uptime | tr -d .)
    rig-tool disk /tmp/drive.sock /tmp/drive.img "$1" "$seed" ${2:-} \
        >/tmp/drive.log 2>&1 </dev/null &
    disk=$!
    await test -S /tmp/drive.sock
    await gone /dev/nbd15
    nbd-client -unix /tmp/drive.sock -N '' -b 512 /dev/nbd15 >/dev/null
    await test -e /sys/block/nbd15/pid
}

# Power off: what the disk has not made durable is gone at this moment, and whoever goes on gets
# errors. The namespace stays: of a flush of one that is gone, the kernel says that all is well.
power_off() {
    kill -9 $disk
    wait $disk || true
    disconnect /dev/nbd15
}

# Power on again, when nobody uses the drive any longer.
power_on() {
    echo 0 >$target/namespaces/1/enable
    disk_on "$1" "${2:-}"
    echo 1 >$target/namespaces/1/enable
    await find_drive
}
