"""The models that this plugin registers with LAVIS."""
