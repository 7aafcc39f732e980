#!/usr/bin/env bash
# Puts ministack into ./site of the build context, by the machine's own pip: an environment of its own,
# since it pins a botocore of its own. For the Python of Debian trixie, whatever this machine's is.
set -euo pipefail
python3 -m pip --disable-pip-version-check install --quiet --root-user-action ignore --target site \
    --only-binary :all: --python-version 3.13 --platform "manylinux2014_$(uname -m)" ministack==1.5.33 >&2
