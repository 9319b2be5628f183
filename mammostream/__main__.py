"""``python -m mammostream``: the command line."""

from mammostream.cli import main

main()
