"""Where Gristmill keeps on this machine what it can make again: $XDG_CACHE_HOME/gristmill."""

import os
from pathlib import Path

CACHES = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gristmill"
