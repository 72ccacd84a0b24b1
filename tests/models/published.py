"""Costs of the networks in the ADM paper (arXiv 2105.05233)."""

PAPER_PEAK = 120e12  # FLOP/s of a V100, by which table 7 computes its theoretical speeds; the data sheet says 125
# name -> (theoretical, reached) training images/s on a V100
TABLE_7 = {
    "adm-64": (182.3, 74.1),
    "adm-128": (65.2, 24.8),
    "adm-256": (17.9, 6.4),
    "upsampler-64-256": (31.7, 9.5),
    "upsampler-128-512": (8.0, 2.3),
}
FAST = ("adm-64", "adm-256")  # counted in every run of the tests; the others are slow tests
