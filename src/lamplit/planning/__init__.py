"""What embedding and tuning will cost, before they run."""
