"""Search in a store."""
