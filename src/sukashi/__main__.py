"""`python -m sukashi`: the same as the command `sukashi`."""

from sukashi.cli import main

main()
