"""Scores, ranks and answers of a split, and the metrics of them.

It knows a model by a protocol alone: :class:`~lavis_aurora.evaluation.encode.RetrievalModel`.
"""
