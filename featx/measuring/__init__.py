"""What a head is worth: scores, intervals, learning curves, what views bring."""
