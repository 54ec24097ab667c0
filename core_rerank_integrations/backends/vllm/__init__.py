"""The vLLM backend: attention mass from hooked prefills of vLLM's own engine.

`plugin` is what vLLM loads in each of its processes: it registers `model`'s adapters around
vLLM's decoders. There `probe` keeps the queries of the selected heads and `pooler` turns them and
the paged keys into attention mass. `engine` is the side that runs in the caller's process, and
`compat` holds all that depends on vLLM's version.
"""
