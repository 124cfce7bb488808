"""Owns training from end to end: what moves, how, and how a killed run goes on."""
