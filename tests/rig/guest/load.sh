# A file system on a disk of the host, and a load on it that only a power cut ends.
modprobe virtio_blk
# A small journal, so that it wraps every other moment.
mkfs.ext4 -q -b 1024 -J size=1 /dev/vda
mount -t ext4 -o discard,commit=1 /dev/vda /mnt
rig-tool files write /mnt 3600 1
