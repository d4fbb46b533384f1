#!/bin/sh
# Destroys this rented machine when its time is up, or when nobody needs it any more. Started by onstart; POSIX sh.
#   watchdog.sh LIMIT_SECONDS STALE_SECONDS API_URL
# - LIMIT_SECONDS after the first start: always. Time is counted from /proc/uptime, a little at a time, so that neither
#   setting the clock nor restarting the machine extends it; what it was stopped for counts too.
# - `released` (written when all results are fetched): at once.
# - nobody in touch for STALE_SECONDS and no job was ever started: nothing can be lost.
# A job that runs, or results that wait to be fetched, keep the machine until the limit, whose cost was accepted.
limit=$1 stale=$2 url=$3
base=$HOME/.sparse_coding
pause=${WATCHDOG_PAUSE:-10}
umask 077
mkdir -p "$base"
# a number alone may be another process's, our own even, once the machine was restarted
born() {
    read -r _ _ is _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ at _ 2>/dev/null <"/proc/$1/stat" && [ "$is" != Z ] && echo "$at"
}
other='' since=''
read -r other since 2>/dev/null <"$base/watchdog.pid"
[ $$ = "$other" ] || [ -z "$since" ] || [ "$(born "$other")" != "$since" ] || exit 0 # it runs already
echo "$$ $(born $$)" >"$base/watchdog.pid"

uptime_seconds() { read -r up _ 2>/dev/null </proc/uptime && echo "${up%.*}" || echo 0; }
say() { echo "$(date -u +%FT%TZ) $*" >>"$base/watchdog.log"; }
of_first_process() { tr '\0' '\n' </proc/1/environ 2>/dev/null | sed -n "s/^$1=//p" | head -n 1; }
contact() { cat "$base/contact" 2>/dev/null; }

# the instance's own key reaches neither a command line nor a file
id=${CONTAINER_ID:-$(of_first_process CONTAINER_ID)}
key=${CONTAINER_API_KEY:-$(of_first_process CONTAINER_API_KEY)}
pythons='python3 /venv/main/bin/python3 /opt/conda/bin/python3'
lacks=''
[ -n "$id" ] || lacks="$lacks; no CONTAINER_ID in its environment"
[ -n "$key" ] || lacks="$lacks; no CONTAINER_API_KEY in its environment"
able() { for program in curl $pythons; do command -v "$program" >/dev/null 2>&1 && return; done; return 1; }
able || lacks="$lacks; neither curl nor python"
printf %s "${lacks#; }" >"$base/watchdog.lacks"

delete() {
    if command -v curl >/dev/null 2>&1; then
        answer=$(printf 'header = "Authorization: Bearer %s"\n' "$key" |
            curl -s -S -m 30 -o /dev/null -w 'HTTP %{http_code}' -K - -X DELETE "$url/api/v0/instances/$id/" 2>&1)
        echo "$answer"
        case $answer in *"HTTP "[1-9]*) return ;; esac # else it may be curl that does not work
    fi
    for python in $pythons; do
        command -v "$python" >/dev/null 2>&1 || continue
        printf '%s' "$key" | "$python" -c '
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], method="DELETE", headers={"Authorization": "Bearer " + sys.stdin.read()})
print("HTTP", urllib.request.urlopen(request, timeout=30).status)' "$url/api/v0/instances/$id/" 2>&1 | tail -n 1
        return
    done
}

destroy() {
    say "destroying this machine: $1"
    while :; do # whatever the answer was: once it works, this loop is gone too
        say "$(delete)"
        sleep "$pause"
    done
}

used='' before=''
read -r used before 2>/dev/null <"$base/watchdog.used"
used=${used:-0} now=$(uptime_seconds) known=$(contact) quiet=0
[ "${before:-$now}" -ge "$now" ] || used=$((used + now - before)) # it was stopped for a while
before=$now
say "started: $((limit - used)) s left$lacks"
while :; do
    sleep "$pause"
    now=$(uptime_seconds)
    [ "$now" -gt 0 ] || now=$((before + ${pause%.*}))
    passed=$((now > before ? now - before : 0)) before=$now
    used=$((used + passed)) quiet=$((quiet + passed))
    echo "$used $now" >"$base/watchdog.used.new" && mv "$base/watchdog.used.new" "$base/watchdog.used"
    seen=$(contact)
    [ "$seen" = "$known" ] || { known=$seen quiet=0; }
    [ "$used" -lt "$limit" ] || destroy "its time is up"
    [ ! -e "$base/released" ] || destroy "everything is fetched"
    [ "$quiet" -lt "$stale" ] || [ -n "$(ls "$base/jobs" 2>/dev/null)" ] || destroy "nobody is in touch, and no job was started"
done
