"""Image bytes -> `uint8` pixels, on a CPU or a GPU."""
