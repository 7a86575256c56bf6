"""Vectors of images that other software made."""
