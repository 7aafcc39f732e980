"""`python -m messaging_sdk.cli` is the `messaging` command."""

from . import main

main()
