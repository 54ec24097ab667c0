"""The OpenVINO backend: a graph of our own for common decoders, on CPUs.

runtime.py      OpenVINO itself, without its telemetry
decoder.py      the parts of a decoder, from its configuration
weights.py      its weights, from the checkpoint
graph.py        the decoder as a graph that returns attention mass
batch.py        prefixes and questions as inputs of the graph
backend.py      the backend
self_test.py    its attention against the model's own
"""
