"""The demo of video-text retrieval."""

from __future__ import annotations

import textwrap
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from demo_retrieval import RetrievalDemo
from demo_runs import Run
from demo_tasks import Row

_SHOWN = 5  # clips of the sheet: the first family


class VideoDemo(RetrievalDemo):
    """Recalls from all frames, and after reranking from the middle frame alone: a clip is more than a picture."""

    kind = "video"
    sections: ClassVar = {**RetrievalDemo.sections, "_one_frame": "one frame, reranked"}
    lines: ClassVar = {**RetrievalDemo.lines, "_one_frame": ("one frame", "-")}
    no_gap = ("_one_frame",)

    def again(self, run: Run) -> list[Run]:
        one = ("datasets.demo_video.vis_processor.eval.n_frms=1",)
        return [Run(run.project, run.tuning, run.rate, run.folder / "one_frame", run.seed, of=run, options=one)]

    def figures(self, run: Run) -> Row:
        row = super().figures(run)
        [further] = self.again(run)
        one = super().figures(further)["metrics"]
        for direction in self.directions:
            row["metrics"].update({f"{direction}_one_frame_r{k}": one[f"{direction}_r{k}"] for k in (1, 5, 10)})
        return row

    def references(self, datasets: dict[str, Any], folder: Path) -> Row:
        """Nothing to compare with; draws some clips of the test split into ``clips.png``."""
        draw_clips(datasets["test"], folder / "clips.png")
        print(f"\nclips of the test split: {folder / 'clips.png'}")
        return {}


def draw_clips(dataset: Any, path: Path, frames: int = 4) -> None:
    """The first clips of a dataset, one a row: so many frames as an evaluation takes them, and the caption."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lavis_aurora.data.frames import read_frames, uniform_indices

    entries = dataset.annotation[:_SHOWN]
    figure = Figure(figsize=(1.3 * frames + 3.2, 1.35 * len(entries)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(entries), frames, squeeze=False)
    for entry, axes in zip(entries, grid):
        clip = read_frames(str(Path(dataset.vis_root) / entry["video"]), partial(uniform_indices, count=frames))
        for axis, frame in zip(axes, clip.permute(0, 2, 3, 1).numpy()):
            axis.imshow(frame)
            axis.set(xticks=[], yticks=[])
        caption = textwrap.fill(" ".join(entry["caption"]), 34)
        axes[-1].text(1.06, 0.5, caption, transform=axes[-1].transAxes, va="center", fontsize=9)
    for number, axis in enumerate(grid[0], start=1):
        axis.set_title(f"frame {number} of {frames}", fontsize=9)
    figure.savefig(path, dpi=110, bbox_inches="tight")


# Rates: those of the retrieval demo; not searched for yet.
VIDEO = VideoDemo(
    project="demo_video.yaml",
    rates={"frozen": 1e-3, "heads": 1e-2, "aurora": 1e-2, "full": 1e-3},
    grid={"heads": (3e-3, 1e-2, 3e-2), "aurora": (3e-3, 1e-2, 3e-2), "full": (3e-4, 1e-3, 3e-3)},
    score="mean recall",
)
