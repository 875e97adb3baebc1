"""`python -m sukashi`: the same as the command `sukashi`."""

from sukashi.cli.main import main

main()
