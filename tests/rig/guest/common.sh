# What the scripts of the guest share.

# Waits until a command succeeds, not for ever.
await() {
    local tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        if [ $tries -ge 600 ]; then
            echo "in vain: $*"
            return 1
        fi
        sleep 0.1
    done
}
