"""One reader for each benchmark."""
