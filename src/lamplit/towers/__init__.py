"""The two networks: image towers, text towers, and the lock."""
