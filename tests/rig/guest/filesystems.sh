# The appliance with an NVMe drive as its cache, and file systems on its volumes by the kernel's
# own client: made, written to and checked; after a crash of the server under load; and after the
# loss of the cache, from the store alone.
. /job/common.sh

check() {
    case $1 in
    ext4) e2fsck -f -n /dev/nbd0 >/tmp/fsck 2>&1 ;;
    xfs) xfs_repair -n /dev/nbd0 >/tmp/fsck 2>&1 ;;
    esac || {
        cat /tmp/fsck
        return 1
    }
    mount -t "$1" /dev/nbd0 /mnt
    rig-tool files check /mnt "/tmp/said-$1"
    umount /mnt
}

# Whether so much was said to be safe.
claimed() { [ "$(grep -c ^safe "/tmp/said-$2")" -ge "$1" ]; }

modprobe nbd
modprobe xfs
await test -b /dev/nvme0n1
serve --cache /dev/nvme0n1
for kind in ext4 xfs; do
    heeler volume create $kind --size 320M --data /tmp/data
    connect $kind /dev/nbd0
    mkfs.$kind -q /dev/nbd0
    mount -t $kind /dev/nbd0 /mnt
    rig-tool files write /mnt 6 1 >/tmp/said-$kind
    umount /mnt
    check $kind

    : >/tmp/said-$kind
    mount -t $kind /dev/nbd0 /mnt
    rig-tool files write /mnt 600 2 >/tmp/said-$kind 2>/tmp/failed &
    writer=$!
    await claimed 60 $kind
    crash
    disconnect /dev/nbd0
    if wait $writer; then
        echo "the writer has not noticed that the server is gone"
        exit 1
    fi
    umount /mnt
    serve --cache /dev/nvme0n1
    connect $kind /dev/nbd0
    # As a machine would after a crash: mounting replays the journal.
    mount -t $kind /dev/nbd0 /mnt
    umount /mnt
    check $kind
    disconnect /dev/nbd0
    echo "$kind: made, written, crashed under load and checked"
done

kill $server
wait $server
dd if=/dev/zero of=/dev/nvme0n1 bs=1M count=8 conv=fsync 2>/dev/null
serve --cache /dev/nvme0n1
for kind in ext4 xfs; do
    connect $kind /dev/nbd0
    check $kind
    disconnect /dev/nbd0
done
kill $server
wait $server
if ! heeler check --deep --data /tmp/data --cache /dev/nvme0n1 >/tmp/check 2>&1; then
    cat /tmp/check
    exit 1
fi
echo "all of it came back from the store"
