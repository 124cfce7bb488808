"""Frozen networks: what is asked for, how it is loaded, where it is cut."""
