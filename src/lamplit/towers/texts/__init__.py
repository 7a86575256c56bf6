"""Text towers and their tokenizers."""
