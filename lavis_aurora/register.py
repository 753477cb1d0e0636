"""Importing this module registers everything with LAVIS, once."""

import warnings

with warnings.catch_warnings():
    # LAVIS's pinned fairscale and torch's own notices: nothing that a user could act on.
    warnings.simplefilter("ignore", FutureWarning)
    # LAVIS registers schedulers and runners only when they are imported.
    import lavis.common.optims  # noqa: F401
    import lavis.runners  # noqa: F401

from lavis_aurora.common.paths import register_resolvers, use_data_root

register_resolvers()
use_data_root()

import lavis_aurora.data.builders  # noqa: E402, F401
import lavis_aurora.data.demo_builder  # noqa: E402, F401
import lavis_aurora.data.frames  # noqa: E402, F401
import lavis_aurora.models.blip_retrieval_aurora  # noqa: E402, F401
import lavis_aurora.models.blip_vqa_aurora  # noqa: E402, F401
import lavis_aurora.models.mode_approx_model  # noqa: E402, F401
import lavis_aurora.training.runner  # noqa: E402, F401
import lavis_aurora.training.tasks.answers  # noqa: E402, F401
import lavis_aurora.training.tasks.retrieval  # noqa: E402, F401
