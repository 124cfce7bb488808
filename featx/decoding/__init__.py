"""Owns decoding on a GPU: which JPEG files can go there, their pixels there, and how these become Pillow's."""
