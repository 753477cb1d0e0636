"""Search and questions over one's own pictures and clips."""

from lavis_aurora.search.index import PictureIndex
from lavis_aurora.search.ranking import Hit

__all__ = ["Hit", "PictureIndex"]
