"""`python -m lamplit` is the command `lamplit`."""

import sys

try:
    from lamplit.cli.main import main

    main()
except KeyboardInterrupt:  # before there is a command
    sys.exit(130)
