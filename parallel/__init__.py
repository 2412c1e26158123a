"""How do many processes train one network as one? So far: what their communication costs."""

from parallel.communication import AlphaBeta

__all__ = ["AlphaBeta"]
