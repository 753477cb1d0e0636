"""Other ways of tuning the same models, to compare with: LoRA and UniAdapter.

Each is a kind of set of adapter parameters, see :mod:`lavis_aurora.adapters.sets`; they know no tower.
"""
