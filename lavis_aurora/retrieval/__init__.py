"""Retrieval evaluation: scores and metrics."""
