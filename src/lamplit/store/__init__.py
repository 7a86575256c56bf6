"""The store: one table of pairs and vectors; how it is filled, exchanged and read."""
