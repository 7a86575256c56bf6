"""What only the fork server of the page's processes imports: the libraries of all of them, in memory once for all."""

import gc

import fastapi  # noqa: F401

import lamplit.app.connections
import lamplit.retrieval.kernels
import lamplit.store.embed.backends  # noqa: F401 (not Lance and pyarrow, whose threads do not survive a fork)

gc.freeze()  # a collection would write to all of it, and so copy it for each process
