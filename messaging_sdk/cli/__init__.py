"""The `messaging` command. Needs the extra `cli`; the commands about the contract also need `contract`."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"the messaging command needs {error.name!r}; run: pip install 'portable-messaging[cli]'")
    app()
