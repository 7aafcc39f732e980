#!/usr/bin/env bash
# Builds one broker image from its recipe, without an image registry: build.sh SERVICE TAG [FILE...]
# Guarantee: exit 0 means that image TAG exists. FILEs join the recipe folder as build context. Progress goes to stderr.
set -euo pipefail

service=$1 tag=$2
shift 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
context=$(mktemp -d -t messaging-sdk-test.XXXXXX)
log=$(mktemp -t messaging-sdk-test.XXXXXX)
trap 'rm -rf "$context" "$log"' EXIT

# One build at a time: processes that start together would otherwise make the same base image twice.
exec 9>"${TMPDIR:-/tmp}/messaging-sdk-test.build.lock"
flock 9

exists() { docker image inspect "$1" >/dev/null 2>&1; }

make_base() { # SUITE -> image messaging-sdk-test/base:SUITE, out of this machine's own package archive
    local suite=$1 mirror
    exists "messaging-sdk-test/base:$suite" && return
    if ! command -v mmdebstrap >/dev/null; then
        echo "build: mmdebstrap is missing, and no image registry can be reached: no base image." >&2
        echo "Install mmdebstrap (Debian), or give this machine a way to the official images." >&2
        return 1
    fi
    mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -v security | head -n 1)
    echo "build: base image of Debian $suite (about 20 s) ..." >&2
    # Valid-Until: an archive snapshot or a machine's clock may be some days off.
    mmdebstrap --quiet --aptopt='Acquire::Check-Valid-Until "false"' --variant=minbase \
        --include=ca-certificates,wget "$suite" "$context/base.tar" "$mirror" >&2
    docker import "$context/base.tar" "messaging-sdk-test/base:$suite" >/dev/null
    rm "$context/base.tar"
}

fetch_jars() { # what the context's pom.xml names, and all that needs, into libs/: by this machine's Maven and its settings
    if ! command -v mvn >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "build: installing maven ..." >&2
        apt-get -q=2 update >&2
        DEBIAN_FRONTEND=noninteractive apt-get -q=2 install -y --no-install-recommends maven >&2
    fi
    command -v mvn >/dev/null || { echo "build: mvn (Maven) is missing: no jars for $service." >&2; return 1; }
    mvn --quiet --batch-mode --file "$context/pom.xml" dependency:copy-dependencies -DoutputDirectory="$context/libs" >&2
}

exists "$tag" && exit 0
make_base "$(sed -n 's|^FROM messaging-sdk-test/base:||p' "$here/$service/Dockerfile")"
cp -r "$here/$service/." "$@" "$context/"
# What an image needs from elsewhere is fetched here and copied in: the build may reach nothing but Debian's packages.
[ ! -e "$context/pom.xml" ] || fetch_jars
if [ -e "$context/fetch.sh" ]; then
    (cd "$context" && bash fetch.sh)
    rm "$context/fetch.sh"
fi
# The host's network, because a proxy or a private archive is often reachable from there only.
docker build --force-rm --network host --tag "$tag" "$context" >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
