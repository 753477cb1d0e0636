"""Aurora (NeurIPS 2023) for LAVIS: vision-language models tuned with about 0.1M parameters.

Importing this package registers its models, builders, tasks and runner with LAVIS. Where LAVIS is not
installed, the method itself (``mode_approx``, ``alignment``) can still be imported.
"""

from importlib.util import find_spec

from lavis_aurora.config import ContextConfig, GateConfig, ModeApproxConfig
from lavis_aurora.errors import AuroraError
from lavis_aurora.mode_approx import inject_mode_approx, trainable_parameters_summary

__version__ = "0.1.0"
__all__ = [
    "AuroraError",
    "ContextConfig",
    "GateConfig",
    "ModeApproxConfig",
    "inject_mode_approx",
    "trainable_parameters_summary",
]

if find_spec("lavis") is not None:
    import lavis_aurora.register  # noqa: F401
    from lavis_aurora.loading import load_model_and_preprocess  # noqa: F401

    __all__ += ["load_model_and_preprocess"]
