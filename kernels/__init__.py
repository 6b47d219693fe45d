"""The operations that decide the cost of training, each beside its reference. The map is in kernels/README.md."""

from gristmill.kernels.dispatch import report, use_reference

__all__ = ["report", "use_reference"]
