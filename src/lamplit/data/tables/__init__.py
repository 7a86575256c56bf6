"""Rows of tables as they stand in their files: which files, which columns, what the cells mean."""
