"""Measures heads: scores with intervals, learning curves, the gain by views."""
