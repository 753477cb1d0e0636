"""Sets of adapter parameters, of any kind: the protocol, switching, files and merging. Torch and safetensors only.

A kind of adapter implements :class:`~lavis_aurora.adapters.sets.AdapterSets` and has all of it.
"""
