"""A tuning run and its parts."""
