"""The exported file: making it, comparing it with the classifier, and running it without torch."""
