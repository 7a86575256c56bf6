"""Results that people can read and cite: beside the published figures, as Markdown, CSV, JSON and one page."""
