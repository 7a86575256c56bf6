"""Data sets and repositories that are fetched by a name."""
