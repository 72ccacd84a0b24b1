"""What passes cost in the tests of the search: each guide as much as the model, so that evaluations are whole."""

from models.diffusion import DiffusionConfig
from orchestrator.search.space import Passes

PASSES = Passes(DiffusionConfig(), {("classifier", None): 1.0, ("classifier_free", None): 1.0, ("auto", "weak"): 0.25})
