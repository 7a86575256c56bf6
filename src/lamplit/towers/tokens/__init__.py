"""Tokenizers: from texts to ids, by the vocabularies of all text towers."""
