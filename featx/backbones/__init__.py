"""Frozen networks: the request, loading, and the cut that gives features."""
