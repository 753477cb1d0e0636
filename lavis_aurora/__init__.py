"""Aurora (NeurIPS 2023) for LAVIS: vision-language models tuned with about 0.1M parameters.

Importing this package registers its models, builders, tasks and runner with LAVIS. Where LAVIS is not
installed, the method itself (``mode_approx``, ``alignment``) can still be imported.
"""

from importlib.util import find_spec

import lavis_aurora.alignment  # noqa: F401
from lavis_aurora.common.errors import AuroraError
from lavis_aurora.common.version import __version__ as __version__
from lavis_aurora.config import ContextConfig, GateConfig, ModeApproxConfig
from lavis_aurora.mode_approx import (
    delete_adapter,
    disable_adapter,
    inject_mode_approx,
    list_adapters,
    load_adapter,
    merge_adapter,
    merged_state_dict,
    save_adapter,
    set_adapter,
    trainable_parameters_summary,
    unmerge_adapter,
)

__all__ = [
    "AuroraError",
    "ContextConfig",
    "GateConfig",
    "ModeApproxConfig",
    "delete_adapter",
    "disable_adapter",
    "inject_mode_approx",
    "list_adapters",
    "load_adapter",
    "merge_adapter",
    "merged_state_dict",
    "save_adapter",
    "set_adapter",
    "trainable_parameters_summary",
    "unmerge_adapter",
]

if find_spec("lavis") is not None:
    import lavis_aurora.register  # noqa: F401
    from lavis_aurora.models.loading import load_model_and_preprocess  # noqa: F401

    __all__ += ["load_model_and_preprocess"]
