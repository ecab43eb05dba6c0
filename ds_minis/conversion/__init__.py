"""What a conversion asks and tells: what can be tiled, how large the chunks are, and what became of a model."""
