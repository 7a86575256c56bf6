"""Models as files that other libraries open."""
