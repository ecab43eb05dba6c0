"""The needle-in-a-haystack test: its tasks, whether a model answers, and what a run found."""
