"""The two contrastive losses."""
