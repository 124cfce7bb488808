"""The feature cache: its files, when they are trusted, and what people do with it."""
