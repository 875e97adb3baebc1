"""`python -m sukashi` and the command `sukashi`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line: whenever it is interrupted, while it is still being read too, it ends with a sentence."""
    try:
        from sukashi.cli.main import main as run  # takes a while

        run()
    except KeyboardInterrupt:
        print("sukashi: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
