"""The research wing: which heads of a model tell the relevant document, and how well they do.

    collection.py    judged questions and their candidates, in the layouts of BEIR and TREC
    features.py      what every head gives to every document
    detection.py     SCoRe and QR: the best heads
    fitting.py       a weight for each of them, and a calibration
    evaluation.py    methods side by side, with their measures and tests
    plots.py         pictures of all that

What reranks never imports it; the commands `heads find`, `heads fit` and `evaluate` do, and the
demo. `make lint` checks that.
"""
