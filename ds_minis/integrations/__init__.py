"""The only modules that know the training engines. Each is imported when, and only when, its engine is."""
