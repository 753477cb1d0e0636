"""The models registered with LAVIS: BLIP with Aurora for retrieval and answers, mode approximation around any other.

Also their weights, and LAVIS's loader with a default type and clear errors.
"""
