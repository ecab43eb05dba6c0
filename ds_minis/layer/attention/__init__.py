"""The one call of its attention that a tiled layer makes for all tokens: found, given its output, kept, or cut by heads."""
