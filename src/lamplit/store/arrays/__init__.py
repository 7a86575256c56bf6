"""What is derived from a store: arrays of vectors and captions, memory-mapped where there are many."""
