"""Rerank retrieved documents by a language model's contrastive retrieval heads.

reranker.py     `CoReReranker`: a query and its documents in, ranked results out
remote/         `RemoteReranker`: the same, by a server
ranking.py      from scores to results
scorer.py       from lists of documents to scores
method/         the method of the paper: prompts, windows, scores, evidence
heads/          head sets: the heads to read and how they rank
models/         names, files, configurations and tokenizers of models
backends/       the libraries that run models
integrations/   LangChain and LlamaIndex
research/       finding, fitting and evaluating heads
chat/           a chatbot
serving/        a rerank server
batch/          reranking whole collections
cli/            the command line
"""

import lazy_loader

__version__ = "0.1.0"

# The public names are listed once, in __init__.pyi, and imported on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
