"""The Transformers backend: CPUs and GPUs, any decoder with Transformers' attention interface.

backend.py     the backend
packing.py     prefixes and questions as one sequence
attention.py   attention outputs and attention mass of parts of that sequence
checks.py      dtypes, and models that cannot be read
"""
