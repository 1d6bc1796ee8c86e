# Power cuts of the drive under the appliance while a client writes: nothing that was flushed, or
# written with FUA, is lost, and nothing comes back that was never written.
. /job/common.sh
. /job/drive.sh

# Writes until the power is cut, as soon as it was told so many times that something is safe.
write_and_cut() {
    : >/tmp/wrote
    rig-tool blocks write /dev/nbd0 /tmp/state 600 "$1" >>/tmp/wrote 2>&1 &
    writer=$!
    await wrote "$2"
    # The drive alone at first, every other time the server a moment before it.
    [ $(($1 % 2)) -eq 0 ] || crash
    power_off
    [ $(($1 % 2)) -eq 1 ] || crash
    disconnect /dev/nbd0
    wait $writer || {
        cat /tmp/wrote
        return 1
    }
}

wrote() { [ "$(wc -l </tmp/wrote)" -ge "$1" ]; }

recover() {
    serve --cache "$drive" && connect web /dev/nbd0 &&
        rig-tool blocks check /dev/nbd0 /tmp/state >/tmp/checked 2>&1
}

make_drive 256M
serve --cache "$drive"
heeler volume create web --size 128M --data /tmp/data
connect web /dev/nbd0
number=0
while [ $number -lt 20 ]; do
    number=$((number + 1))
    write_and_cut $number $((10 + number * 37 % 61))
    power_on 40
    if ! recover; then
        cat /tmp/checked
        exit 1
    fi
    echo "cut $number: $(tail -n 1 /tmp/wrote); $(cat /tmp/checked)"
done

# A test of this test: a drive that lies is found out.
disconnect /dev/nbd0
crash
power_off
power_on 0 lying
serve --cache "$drive"
connect web /dev/nbd0
write_and_cut $((number + 1)) 40
power_on 40
# A server that notices may go on without the volume.
patience=100
if recover; then
    echo "a drive that does not flush has not been noticed"
    exit 1
fi
echo "a drive that lies is found out"
