"""The OpenVINO backend: a graph of our own for the decoders that most people run, on CPUs.

decoder.py    what a decoder is made of, from its configuration
weights.py    its weights, from the checkpoint
graph.py      both as one graph that ends in attention mass
batch.py      documents and questions as the graph's inputs
backend.py    what calls it
"""
