"""The adapters that a run leaves: folders to load, share and merge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lavis.common.dist_utils import main_process
from omegaconf import DictConfig, OmegaConf

from lavis_aurora.adapters.config import CONFIG, read_adapter_config
from lavis_aurora.adapters.files import save_adapter
from lavis_aurora.adapters.switching import find_adapters
from lavis_aurora.models.adapter_settings import PROCESSOR_KINDS, is_portable_processor


class AdapterMixin:
    """In front of LAVIS's runner: ``adapter_best`` and ``adapter_last`` beside the checkpoints, with metrics."""

    @main_process
    def _save_adapter(self, kind: str, metrics: Mapping[str, Any]) -> None:
        """Write the adapter as it is now; nothing for a model that is tuned without any.

        Args:
            kind: best or last.
            metrics: to add to those that the folder holds of the same epoch; a split's are a section.
        """
        model = self.unwrap_dist_model(self.model)
        if find_adapters(model) is None:
            return
        folder = self.output_dir / f"adapter_{kind}"
        known = read_adapter_config(folder).metrics if (folder / CONFIG).is_file() else {}
        if known.get("epoch") != metrics.get("epoch", known.get("epoch")):
            known = {}
        processors = _processors(self.config.datasets_cfg)
        save_adapter(
            model,
            folder,
            metrics={**known, **_plain(metrics)},
            description={"preprocess": processors} if processors else None,
        )


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and words alone, the numbers finite: what a JSON file can hold."""
    nested = {key: _plain(value) for key, value in metrics.items() if isinstance(value, Mapping)}
    plain = {
        key: value
        for key, value in metrics.items()
        if isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    }
    return {**plain, **nested}


def _processors(datasets: DictConfig) -> dict[str, Any]:
    """The processors of the first dataset that has any; without those whose settings may name files."""
    for dataset in datasets.values():
        found = {kind: dataset[kind] for kind in PROCESSOR_KINDS if dataset.get(kind) is not None}
        if found:
            plain = OmegaConf.to_container(OmegaConf.create(found), resolve=True)
            return {
                kind: {split: part for split, part in splits.items() if is_portable_processor(part or {})}
                for kind, splits in plain.items()
            }
    return {}
