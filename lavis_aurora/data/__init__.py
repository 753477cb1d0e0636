"""Datasets: builders that LAVIS lacks, annotations fetched, checked and converted, samples.

Checks are registered for a builder, a kind of data or a dataset's class (``checks``).
"""
