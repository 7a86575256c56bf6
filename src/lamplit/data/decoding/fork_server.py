"""What only the fork server of the workers imports: it ends last, and takes the sockets of a killed process away.

The workers end when the main process does (`workers.py`). If that was killed, its temporary folder with the address of
the fork server is left, and it may have had no worker yet that could remove it. The fork server ends after all of them,
in the ordinary way. The processes that it forks never come to what is registered here.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal

FOLDER = "LAMPLIT_WORKERS_FOLDER"  # where the main process has its sockets

if folder := os.environ.pop(FOLDER, None):
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Ctrl-C reaches all processes, and Python's own fork server hears it until it has imported everything.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
