"""The table of a store: its rows and columns, how it is opened, and how several processes write to it."""
