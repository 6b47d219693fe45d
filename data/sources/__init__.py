"""Where documents come from. A source lists its parts, and reads one part at a time, on any worker, the same rows."""

from gristmill.data.sources.base import BadRecord, Contents, Held, Reader
from gristmill.data.sources.dataset import DatasetSource
from gristmill.data.sources.files import FilesSource
from gristmill.data.sources.lessons import LessonsSource
from gristmill.data.sources.stdlib import StdlibSource

__all__ = ["BadRecord", "Contents", "DatasetSource", "FilesSource", "Held", "LessonsSource", "Reader", "StdlibSource"]
