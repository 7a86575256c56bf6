"""`python -m lamplit` is the command `lamplit`."""

from lamplit.cli.main import main

main()
