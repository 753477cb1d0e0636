"""Every key that a lavis_aurora YAML may hold: its default, its check, and where it comes from.

LAVIS's own keys keep their names and meaning. Sections and tables are those of the Aurora paper
(NeurIPS 2023). What is imported here needs nothing but the standard library, so that the method can use it
without LAVIS; ``check``, which needs omegaconf, is imported by its own name.
"""

from lavis_aurora.config.method import (
    CONTEXT_FORMS,
    GATE_FORMS,
    GATE_INITS,
    SHARINGS,
    ContextConfig,
    GateConfig,
    LoraConfig,
    ModeApproxConfig,
    UniAdapterConfig,
)
from lavis_aurora.config.models import (
    TUNINGS,
    BlipAuroraConfig,
    ModeApproxModelConfig,
    RetrievalAuroraConfig,
    VitConfig,
    VqaAuroraConfig,
    register_tuning,
)
from lavis_aurora.config.run import (
    INFERENCE_METHODS,
    RUN_KEYS,
    TOKEN_DTYPES,
    AnswerRunConfig,
    CaptionRunConfig,
    RetrievalRunConfig,
    RunConfig,
    VideoProcessorConfig,
    register_run_keys,
)

__all__ = [
    "CONTEXT_FORMS",
    "GATE_FORMS",
    "GATE_INITS",
    "INFERENCE_METHODS",
    "RUN_KEYS",
    "SHARINGS",
    "TOKEN_DTYPES",
    "TUNINGS",
    "AnswerRunConfig",
    "BlipAuroraConfig",
    "CaptionRunConfig",
    "ContextConfig",
    "GateConfig",
    "LoraConfig",
    "ModeApproxConfig",
    "ModeApproxModelConfig",
    "RetrievalAuroraConfig",
    "RetrievalRunConfig",
    "RunConfig",
    "UniAdapterConfig",
    "VideoProcessorConfig",
    "VitConfig",
    "VqaAuroraConfig",
    "register_run_keys",
    "register_tuning",
]
