"""Rerank whole collections, in this process or on Ray.

options.py   options of the functions below
lists.py     from lists to results, the same way in this process and on Ray
run.py       a TREC run over a collection                       `rerank_run`
journal.py   finished queries of a run that was interrupted
dataset.py   a table of lists on Ray Data                       `rerank_dataset`
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
