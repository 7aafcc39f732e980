#!/usr/bin/env bash
# Puts Kafka's jars into ./libs of the build context, by the machine's own Maven and its settings.
set -euo pipefail
command -v mvn >/dev/null || { echo "build: mvn (Maven) is missing: no jars for Kafka." >&2; exit 1; }
mvn --quiet --batch-mode --file pom.xml dependency:copy-dependencies -DoutputDirectory="$PWD/libs" >&2
