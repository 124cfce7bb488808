"""Owns what people look at: pages, figures, sweeps, learning curves, model cards."""
