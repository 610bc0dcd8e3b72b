#!/bin/sh
# Takes this host out of the mesh, now, with nothing else of vmesh working: its rules are removed, and a flag keeps vmesh-net
# from bringing them back.
#
#   bypass                      removes all rules; connections that go through Envoy are reset
#   bypass --keep-connections   captures nothing new, and leaves what keeps open connections open; run `bypass` later
#   bypass --lift               takes the flag away: the host captures again as it is configured
#
# Safe to repeat. Ends with 0 when nothing is captured any more.
set -u

flag=${VMESH_BYPASS_FLAG:-/var/lib/vmesh-net/bypass}
mode=${1:-}
# Only root can put programs into these; the caller's own PATH comes after them.
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
        echo 'bypass: lifted; the host captures again as it is configured'
        exit 0
        ;;
    *)
        echo "bypass: what is $mode? Use: bypass [--keep-connections | --lift]" >&2
        exit 2
        ;;
esac

# The flag first: a vmesh-net that lives must not undo the rest. That it is there counts; who set it is a courtesy, for which a full
# disk may have no room.
if mkdir -p "${flag%/*}" && : >>"$flag"; then
    echo "by $(id -un 2>/dev/null) at $(date 2>/dev/null)" 2>/dev/null >"$flag" || :
else
    fail "could not write $flag; a vmesh-net that runs brings the rules back: stop it (systemctl stop vmesh-net)"
fi

if has nft && nft list tables 2>/dev/null | grep -qx 'table inet vmesh'; then
    if [ -n "$mode" ]; then
        # Without its rules a chain sends nobody to Envoy, and goes on translating what it has sent there.
        chains=$(nft list table inet vmesh | sed -n 's/^[[:space:]]*chain \([a-z0-9_]*\) {.*/\1/p' | grep -vx hold)
        for chain in $chains; do echo "flush chain inet vmesh $chain"; done | nft -f - || fail 'nft could not empty its chains'
    else
        nft delete table inet vmesh || fail 'nft could not delete its table inet vmesh'
    fi
fi

# Prints what takes our chains out of what iptables-save prints, or with keep=1 only what is in them.
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

# A host can have both kinds of iptables, and rules in either.
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

[ "$failed" -eq 0 ] && echo "bypass: nothing is captured any more; $flag keeps it so (bypass --lift)"
exit "$failed"
