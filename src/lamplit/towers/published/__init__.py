"""The paper's authors' own models."""
