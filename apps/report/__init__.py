"""A comparison for people: terminal, page, Markdown; and for machines: JSON."""
