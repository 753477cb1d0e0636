"""What the demo makes for itself: captioned pictures and clips of two domains, and questions about them.

Everything follows from a seed.
"""
