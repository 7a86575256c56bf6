"""A model and its store as a web page and a small HTTP API (`lamplit app`)."""
