#!/usr/bin/env bash
# Makes a container engine answer. Guarantee: exit 0 means `docker info` works; it changes nothing when it already does.
# Where none answers, on Debian as root, it installs the engine and what builds our images, and starts it in the background.
set -euo pipefail

engine_wait_s=60 # a cold start takes 5 s here; ten times that on a loaded machine is still no hang

say() { echo "engine: $*" >&2; }
answers() { docker info >/dev/null 2>&1; }
engine_pid() { pgrep -x dockerd | head -n 1 || true; }

if answers; then
    say "ready"
    exit 0
fi

if [ "$(id -u)" != 0 ] || [ ! -e /etc/debian_version ]; then
    say "no container engine answers, and only on Debian as root can one be set up here."
    say "Start Docker (or set DOCKER_HOST) and run again; \`make check\` and \`make demo\` need no engine."
    exit 1
fi

packages=()
command -v dockerd >/dev/null || packages+=(docker.io containerd runc)
command -v iptables >/dev/null || packages+=(iptables)
command -v mmdebstrap >/dev/null || packages+=(mmdebstrap)
if [ ${#packages[@]} -gt 0 ]; then
    say "installing ${packages[*]} (about 60 s) ..."
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q=2 update >&2
    # From Debian 13 on the client is a package of its own.
    if ! command -v docker >/dev/null && apt-cache show docker-cli >/dev/null 2>&1; then
        packages+=(docker-cli)
    fi
    apt-get -q=2 install -y --no-install-recommends "${packages[@]}" >&2
fi

log=""
if [ -z "$(engine_pid)" ]; then
    # An engine killed with -9 leaves its pid file; a reused pid in it would stop the next start.
    rm -f /var/run/docker.pid
    log=$(mktemp -t dockerd.XXXXXX.log)
    say "starting dockerd, log in $log ..."
    setsid nohup dockerd >"$log" 2>&1 </dev/null &
fi

for ((waited_s = 0; waited_s < engine_wait_s; waited_s++)); do
    if answers; then
        say "ready after $waited_s s"
        exit 0
    fi
    if [ -z "$(engine_pid)" ] && ((waited_s > 2)); then
        break
    fi
    sleep 1
done
say "dockerd did not become ready${log:+; last lines of its log:}"
[ -z "$log" ] || tail -n 15 "$log" >&2
exit 1
