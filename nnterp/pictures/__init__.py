"""Figures of what the interventions find: plotly figures that are returned, and shown by whoever wants to see them."""

from nnterp.pictures.patching import check_plotly, plot_patching

__all__ = ["check_plotly", "plot_patching"]
