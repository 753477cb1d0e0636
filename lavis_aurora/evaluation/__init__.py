"""Scores, ranks and answers of a split, and the metrics of them."""
