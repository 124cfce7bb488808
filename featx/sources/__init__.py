"""Data sets: where images, labels and splits come from. One file per kind."""
