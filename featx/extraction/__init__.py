"""The main path: images -> keys -> pixels -> features."""
