"""Costs of forward passes in tests of the search: a guide costs as much as the model, except for the kind auto."""

from models.diffusion import DiffusionConfig
from orchestrator.search.space import PassCosts

PASSES = PassCosts(
    DiffusionConfig(), {("classifier", None): 1.0, ("classifier_free", None): 1.0, ("auto", "weak"): 0.25}
)
