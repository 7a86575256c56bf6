"""Where images lie: files, places inside tars and tables, and what stands beside them."""
