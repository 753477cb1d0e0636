"""Visual question answering: ranking and decoding of answers."""
