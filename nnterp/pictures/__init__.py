"""Figures of what the interventions find: plotly figures that are returned, and shown by whoever wants to see them."""

from nnterp.pictures.drawing import check_plotly
from nnterp.pictures.patching import plot_patching

__all__ = ["check_plotly", "plot_patching"]
