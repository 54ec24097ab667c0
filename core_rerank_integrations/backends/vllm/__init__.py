"""The vLLM backends: attention mass from prefills of vLLM's own engine, seen by probes.

plugin.py    what vLLM loads in each of its processes
request.py   what travels between caller and engine
compat.py    everything that depends on vLLM's version
caller/      the side in the user's process
worker/      the side in vLLM's processes
"""
