"""Importing this module registers everything with LAVIS, once."""

import warnings

with warnings.catch_warnings():
    # LAVIS's pinned fairscale and torch's own notices: nothing that a user could act on.
    warnings.simplefilter("ignore", FutureWarning)
    # LAVIS registers schedulers and runners only when they are imported.
    import lavis.common.optims  # noqa: F401
    import lavis.runners  # noqa: F401

from lavis_aurora.paths import register_resolvers, use_data_root

register_resolvers()
use_data_root()

import lavis_aurora.data.demo_builder  # noqa: E402, F401
import lavis_aurora.data.frames  # noqa: E402, F401
import lavis_aurora.data.own  # noqa: E402, F401
import lavis_aurora.data.video_qa  # noqa: E402, F401
import lavis_aurora.models.blip_retrieval_aurora  # noqa: E402, F401
import lavis_aurora.models.blip_vqa_aurora  # noqa: E402, F401
import lavis_aurora.models.mode_approx_model  # noqa: E402, F401
import lavis_aurora.runner  # noqa: E402, F401
import lavis_aurora.tasks  # noqa: E402, F401
import lavis_aurora.tasks_video_qa  # noqa: E402, F401
import lavis_aurora.tasks_vqa  # noqa: E402, F401
