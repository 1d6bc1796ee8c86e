# What the scripts of the guest share.

# Tenths of a second that a wait may take, and what the tries take besides.
patience=900

# Waits until a command succeeds, not for ever.
await() {
    local tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        if [ $tries -ge $patience ]; then
            echo "in vain: $*"
            return 1
        fi
        sleep 0.1
    done
}

# The appliance with these flags, until `$server` is killed. Its store lies in the guest's memory: a
# real one is elsewhere, and what happens to this machine does not happen to it.
serve() {
    # What the last one said is none of this one's.
    rm -f /tmp/heeler.log
    heeler serve --data /tmp/data --listen unix:/tmp/nbd.sock --memory 96M --shards 2 "$@" \
        >/tmp/heeler.log 2>&1 </dev/null &
    server=$!
    await serve_has_begun
    if ! grep -q '^ready' /tmp/heeler.log; then
        local status=0
        wait $server || status=$?
        echo "the server has ended with $status"
        tail -n 20 /tmp/heeler.log
        return 1
    fi
}

serve_has_begun() { grep -q '^ready' /tmp/heeler.log || ! kill -0 $server; }

# Ends the server as a crash would.
crash() {
    kill -9 $server
    wait $server || true
}

# Attaches a volume to a device by the kernel's client, over two connections. A server is ready a
# moment before it has taken up its volumes.
connect() {
    await gone "$2"
    await nbd-client -unix /tmp/nbd.sock -N "$1" -b 4096 -C 2 "$2"
    await test -e "/sys/block/${2#/dev/}/pid"
}

# Detaches it; what is under way fails at once, instead of waiting for another server. It is there
# until nobody has it open.
disconnect() { nbd-client -d "$1" >/dev/null 2>&1 || true; }

gone() { [ ! -e "/sys/block/${1#/dev/}/pid" ]; }
