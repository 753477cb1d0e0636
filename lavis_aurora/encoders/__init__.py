"""LAVIS's towers as this package runs them: fused attention, gates and bottlenecks, packed texts.

An image's keys and values serve all texts that attend to it.
"""
