"""Tars of images and captions, read in one pass."""
