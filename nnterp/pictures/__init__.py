"""Figures of what the interventions find: plotly figures that are returned, and shown by whoever wants to see them."""

from nnterp.pictures.attention import plot_attention, plot_head_scores
from nnterp.pictures.attribution import plot_attribution
from nnterp.pictures.drawing import check_plotly
from nnterp.pictures.lens import plot_lens, plot_target_probs
from nnterp.pictures.patching import plot_patching
from nnterp.pictures.saving import FigureFileError, check_figure_file, save_figure

__all__ = [
    "check_figure_file",
    "check_plotly",
    "FigureFileError",
    "plot_attention",
    "plot_attribution",
    "plot_head_scores",
    "plot_lens",
    "plot_patching",
    "plot_target_probs",
    "save_figure",
]
