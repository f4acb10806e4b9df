"""matplotlib, for pictures in files and arrays: without a display, and without pyplot and its backends.

A notebook names its backend in MPLBACKEND, also for the programs that it starts. Where that backend is not installed,
matplotlib cannot even be imported. A notebook that runs us in itself keeps the backend that it has.
"""

import os
import sys
from contextlib import suppress

try:
    named = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
finally:
    if named:
        os.environ["MPLBACKEND"] = named
if named:
    with suppress(ValueError):  # it is not installed
        matplotlib.rcParams["backend"] = named

__all__ = ["Figure", "FigureCanvasAgg", "matplotlib"]
