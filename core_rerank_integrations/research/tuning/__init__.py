"""Tuning: an adapter and head weights that are trained together, on lists.

lists.py     which lists are drawn
reading.py   calibrated attention mass as a differentiable function of the model
ranker.py    the model, its adapter and the head weights
training.py  the loop: steps, choosing on dev, checkpoints
tune.py      from options to a head set with an adapter      `tune_heads`
"""
