"""Owns the feature cache: what lies on the disk, who may believe it, and what people do with it."""
