"""Token-wise modules over chunks: classes swapped in place, and what must not be inside of a chunk loop."""
