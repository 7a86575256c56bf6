"""Pairs of images and texts: reading them, decoding their images safely, fetching named data sets."""
