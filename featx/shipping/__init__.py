"""Owns the exported file: making it, holding it to the classifier, and running it without torch."""
