"""What only the fork server of the page's processes imports: the libraries of the towers, in memory once for all."""

import gc

import lamplit.app.connections
import lamplit.store.backends  # noqa: F401 (not Lance, which is not made to be forked)

gc.freeze()  # a collection would write to all of it, and so copy it for each process
