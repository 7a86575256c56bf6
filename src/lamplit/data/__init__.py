"""Pairs of pictures and texts: reading them, decoding their pictures safely, fetching named data sets."""
