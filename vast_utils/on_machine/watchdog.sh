#!/bin/sh
# Destroys this rented machine when its time is up, or when nobody needs it any more. Started by onstart; POSIX sh.
#   watchdog.sh LIMIT_SECONDS STALE_SECONDS API_URL
# - LIMIT_SECONDS after the first start: always. Time is counted from /proc/uptime, a little at a time, so that neither
#   setting the clock nor restarting the machine extends it.
# - `released` (written when all results are fetched): at once.
# - nobody in touch for STALE_SECONDS and no job was ever started: nothing can be lost.
# A job that runs, or results that wait to be fetched, keep the machine until the limit, whose cost was accepted.
limit=$1 stale=$2 url=$3
base=$HOME/.sparse_coding
pause=${WATCHDOG_PAUSE:-10}
umask 077
mkdir -p "$base"
other=$(cat "$base/watchdog.pid" 2>/dev/null)
[ -z "$other" ] || ! tr '\0' ' ' <"/proc/$other/cmdline" 2>/dev/null | grep -q watchdog.sh || exit 0 # it runs already
echo $$ >"$base/watchdog.pid"

uptime_seconds() { read -r up _ 2>/dev/null </proc/uptime && echo "${up%.*}" || echo 0; }
say() { echo "$(date -u +%FT%TZ) $*" >>"$base/watchdog.log"; }
of_first_process() { tr '\0' '\n' </proc/1/environ 2>/dev/null | sed -n "s/^$1=//p" | head -n 1; }
contact() { cat "$base/contact" 2>/dev/null; }

# the instance's own key reaches neither a command line nor a file
delete() {
    id=${CONTAINER_ID:-$(of_first_process CONTAINER_ID)}
    key=${CONTAINER_API_KEY:-$(of_first_process CONTAINER_API_KEY)}
    if command -v curl >/dev/null 2>&1; then
        printf 'header = "Authorization: Bearer %s"\n' "$key" |
            curl -s -S -m 30 -o /dev/null -w 'HTTP %{http_code}' -K - -X DELETE "$url/api/v0/instances/$id/" 2>&1
        return
    fi
    for python in python3 /venv/main/bin/python3 /opt/conda/bin/python3; do
        command -v "$python" >/dev/null 2>&1 || continue
        printf '%s' "$key" | "$python" -c '
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], method="DELETE", headers={"Authorization": "Bearer " + sys.stdin.read()})
print("HTTP", urllib.request.urlopen(request, timeout=30).status)' "$url/api/v0/instances/$id/" 2>&1 | tail -n 1
        return
    done
    echo "neither curl nor python is here"
}

destroy() {
    say "destroying this machine: $1"
    while :; do # whatever the answer was: once it works, this loop is gone too
        say "$(delete)"
        sleep "$pause"
    done
}

used=$(cat "$base/watchdog.used" 2>/dev/null)
used=${used:-0}
before=$(uptime_seconds) known=$(contact) quiet=0
say "started: $((limit - used)) s left"
while :; do
    sleep "$pause"
    now=$(uptime_seconds)
    passed=$((now > before ? now - before : pause)) before=$now
    used=$((used + passed)) quiet=$((quiet + passed))
    echo "$used" >"$base/watchdog.used.new" && mv "$base/watchdog.used.new" "$base/watchdog.used"
    seen=$(contact)
    [ "$seen" = "$known" ] || { known=$seen quiet=0; }
    [ "$used" -lt "$limit" ] || destroy "its time is up"
    [ ! -e "$base/released" ] || destroy "everything is fetched"
    [ "$quiet" -lt "$stale" ] || [ -n "$(ls "$base/jobs" 2>/dev/null)" ] || destroy "nobody is in touch, and no job was started"
done
