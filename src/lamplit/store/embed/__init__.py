"""From pairs to rows of a store: through the locked tower once, again and again, in any number of processes."""
