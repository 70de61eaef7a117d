"""From scores to the probability of being right: fitted to labelled answers of one version of one adapter.

temperature, platt, isotonic    maps to a confidence
conformal                       sets of labels
threshold                       when not to answer
reliability                     how good confidences are
items, fitting, calibration     labelled answers, what is made of them, and an answer with it
histogram                       how far recent scores are from those of the items
settings                        where it holds
kept                            those that a server has
"""

from loramux.uncertainty.calibration.calibration import Calibration, Method
from loramux.uncertainty.calibration.conformal import Sets
from loramux.uncertainty.calibration.fitting import calibrate, methods
from loramux.uncertainty.calibration.items import MAX_ITEMS, Items, of_answers, of_scores
from loramux.uncertainty.calibration.kept import Calibrations
from loramux.uncertainty.calibration.settings import MODES, SCORE, Settings, inputs

__all__ = [
    "MAX_ITEMS",
    "MODES",
    "SCORE",
    "Calibration",
    "Calibrations",
    "Items",
    "Method",
    "Sets",
    "Settings",
    "calibrate",
    "inputs",
    "methods",
    "of_answers",
    "of_scores",
]
