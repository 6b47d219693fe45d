"""Where documents come from. A source lists its parts, and reads one part at a time, on any worker, the same rows."""

from gristmill.data.sources.base import BadRecord, Contents, Cursor, Held, Reader, Skipped
from gristmill.data.sources.dataset import DatasetSource
from gristmill.data.sources.dump import DumpSource
from gristmill.data.sources.files import FilesSource
from gristmill.data.sources.lessons import LessonsSource
from gristmill.data.sources.stdlib import StdlibSource
from gristmill.data.sources.tree import TreeSource
from gristmill.data.sources.warc import WarcSource

__all__ = [
    "BadRecord",
    "Contents",
    "Cursor",
    "DatasetSource",
    "DumpSource",
    "FilesSource",
    "Held",
    "LessonsSource",
    "Reader",
    "Skipped",
    "StdlibSource",
    "TreeSource",
    "WarcSource",
]
