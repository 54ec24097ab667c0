"""The method of arXiv 2510.02219: pure functions of texts, token ids and attention mass.

templates.py     turn markers around the prompt
prompt.py        documents and a question as token ids
passages.py      long documents as passages
windows.py       a list of documents as prompts that fit the model
scoring.py       attention mass to document scores
list_scores.py   scores of prompts to scores of a list
evidence.py      attention mass to sentence scores
extraction.py    documents cut to their best sentences

Nothing here imports a model library or a framework.
"""
