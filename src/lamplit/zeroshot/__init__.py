"""Zero-shot classification: class lists, prompts and names."""
