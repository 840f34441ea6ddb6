"""`python -m hybrid.cli` is the command `hybrid`."""

from hybrid.cli import main

main()
