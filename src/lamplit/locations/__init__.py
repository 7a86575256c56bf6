"""Where sources and stores are: on this machine, or in object storage."""
