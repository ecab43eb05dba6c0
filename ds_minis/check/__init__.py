"""Is a model exact, plain against converted? Used by the command, the census and the tests."""
