"""Aurora (NeurIPS 2023) for LAVIS: vision-language models tuned with about 0.1M parameters.

Importing this package registers its models, builders, tasks and runner with LAVIS, and changes nothing else. Where
LAVIS is not installed, the method itself (``mode_approx``, ``alignment``) can still be imported.
"""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec

import lavis_aurora_compat as compat  # before LAVIS

import lavis_aurora.alignment  # noqa: F401
from lavis_aurora.common import __version__ as __version__
from lavis_aurora.common.errors import AuroraError
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
    truncate_adapter,
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
    "truncate_adapter",
    "unmerge_adapter",
]


def _import_plugins(group: str = "lavis_aurora.plugins") -> None:
    """Import the modules that installed packages name in an entry point group; what fails is one line of warning."""
    found = entry_points()
    # Before Python 3.10 it is a dict.
    named = found.select(group=group) if hasattr(found, "select") else found.get(group, ())
    for plugin in named:
        try:
            import_module(plugin.value.partition(":")[0])
        except Exception as error:  # whatever another package raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            logging.getLogger(__name__).warning("plugin %s (%s) is left out: %s", plugin.name, plugin.value, reason)


if find_spec("lavis") is not None:
    with warnings.catch_warnings():
        # LAVIS's pinned fairscale and torch's own notices: nothing that a user could act on.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            # LAVIS registers schedulers and runners only when they are imported.
            import lavis.common.optims
            import lavis.runners  # noqa: F401
        except (ImportError, KeyError) as error:
            raise ImportError(compat.why_lavis_fails(error)) from error

    import lavis_aurora.data.builders
    import lavis_aurora.data.demo_builder
    import lavis_aurora.data.samples
    import lavis_aurora.models.blip_retrieval_aurora
    import lavis_aurora.models.blip_vqa_aurora
    import lavis_aurora.models.mode_approx_model
    import lavis_aurora.training.runner
    import lavis_aurora.training.tasks.answers
    import lavis_aurora.training.tasks.retrieval  # noqa: F401
    from lavis_aurora.common.media import load_picture  # noqa: F401
    from lavis_aurora.models.loading import load_model_and_preprocess  # noqa: F401

    __all__ += ["load_model_and_preprocess", "load_picture"]
    _import_plugins()
else:

    def __getattr__(name: str) -> object:
        if name == "load_model_and_preprocess":
            raise ImportError(compat.missing_lavis())
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
