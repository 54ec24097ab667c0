"""Research: find, fit and evaluate the heads of a model.

options.py         options of the functions below
collection.py      judged questions, in the layouts of BEIR and TREC
sources.py         judged runs, files of lists, and samples of their questions
features.py        attention of every head on every document
detection.py       SCoRe and QR: the best heads                    `find_heads`
fitting.py         from judged candidates to a head set            `fit_heads`
weights.py         weights of heads
scoring_fit.py     weights of a first stage, and the calibration
evidence_fit.py    weights that separate sentences                 `fit_evidence`
abstention_fit.py  whether a list holds a relevant document        `fit_abstention`
tuning/            an adapter and head weights, trained together   `tune_heads`
evaluation.py      methods side by side, and their differences     `evaluate`
methods.py         methods that order candidates, in one pass
measures.py        measures of rankings and probabilities
report.py          tables, runs and pictures of an evaluation
plots.py           the pictures

Reranking never imports this package; the command line and the demo do. `make lint` checks that.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
