"""Conditions on the columns of a store, such as `--where` takes them."""
