"""Sets of adapter parameters: switching, files, merging. Torch and safetensors only."""
