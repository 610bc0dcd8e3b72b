#!/bin/sh
# Takes this host out of the mesh at once, without any other program of vmesh: it removes all rules of vmesh, and sets a flag that
# keeps vmesh-net from adding them again.
#
#   bypass                      removes all rules; connections that go through Envoy are reset
#   bypass --keep-connections   captures no new connections, and keeps the rules that open connections need; run `bypass` later
#   bypass --lift               removes the flag: vmesh-net captures again as it is configured
#
# The script may be repeated. It exits with 0 once this host captures no new connections.
set -u

flag=${VMESH_BYPASS_FLAG:-/var/lib/vmesh-net/bypass}
mode=${1:-}
# Only root can write to these directories. The PATH of the caller comes after them.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:$PATH
LC_ALL=C
export PATH LC_ALL
failed=0

fail() {
    echo "bypass: $1" >&2
    failed=1
}

has() {
    command -v "$1" >/dev/null 2>&1
}

case $mode in
    '' | --keep-connections) ;;
    --lift)
        rm -f "$flag" || exit 1
        echo 'bypass: removed the flag; vmesh-net captures again as it is configured'
        exit 0
        ;;
    *)
        echo "bypass: unknown option $mode. Usage: bypass [--keep-connections | --lift]" >&2
        exit 2
        ;;
esac

# The flag is set first, so that a running vmesh-net does not undo the rest. Only its existence counts: a full disk may have no room
# for its text, which names the user.
if mkdir -p "${flag%/*}" && : >>"$flag"; then
    echo "by $(id -un 2>/dev/null) at $(date 2>/dev/null)" 2>/dev/null >"$flag" || :
else
    fail "could not write $flag, so a running vmesh-net would add the rules again; stop it: systemctl stop vmesh-net"
fi

if has nft && nft list tables 2>/dev/null | grep -qx 'table inet vmesh'; then
    if [ -n "$mode" ]; then
        # An empty chain redirects no new connection, and the kernel continues to translate the redirected ones.
        chains=$(nft list table inet vmesh | sed -n 's/^[[:space:]]*chain \([a-z0-9_]*\) {.*/\1/p' | grep -vx hold)
        for chain in $chains; do echo "flush chain inet vmesh $chain"; done | nft -f - || fail 'nft could not empty its chains'
    else
        nft delete table inet vmesh || fail 'nft could not delete its table inet vmesh'
    fi
fi

# Prints the input of iptables-restore that removes the chains of vmesh in the output of iptables-save; with keep=1, only their rules.
undo() {
    awk -v keep="${mode:+1}" '
        /^\*/ { table = $0; jumps = flush = drop = "" }
        /^:VMESH_/ {
            name = substr($1, 2)
            if (!keep || name != "VMESH_HOLD") flush = flush "-F " name "\n"
            if (!keep) drop = drop "-X " name "\n"
        }
        /^-A / && !/^-A VMESH_/ && / -[jg] VMESH_/ && !keep { sub(/^-A/, "-D"); jumps = jumps $0 "\n" }
        /^COMMIT/ && jumps flush != "" { printf "%s\n%s%s%sCOMMIT\n", table, jumps, flush, drop }'
}

# A host can have both kinds of iptables, with rules of vmesh in each.
for kind in '' -nft -legacy; do
    for family in iptables ip6tables; do
        save=$family$kind-save
        restore=$family$kind-restore
        has "$save" && has "$restore" || continue
        commands=$("$save" 2>/dev/null | undo)
        [ -n "$commands" ] || continue
        printf '%s\n' "$commands" | "$restore" --noflush -w 5 || fail "$restore could not remove the chains VMESH_*"
    done
done

[ "$failed" -eq 0 ] && echo "bypass: this host captures no new connections; vmesh-net captures nothing while $flag exists (undo: bypass --lift)"
exit "$failed"
