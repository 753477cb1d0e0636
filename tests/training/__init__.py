"""A package, because its modules have names that other folders have too."""
