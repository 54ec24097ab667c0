"""The vLLM backends: attention mass from hooked prefills of vLLM's own engine.

`plugin` is what vLLM loads in each of its processes. There `probe` keeps the queries of the
selected heads, and `attention_sum` turns them and the paged keys into attention mass: in the
`pooler` of a `model` cut above the highest head, for an engine that only reranks, or in a `worker`
extension, for one that generates too. `client` is the side that runs in the caller's process, with
`dedicated` and `shared` for the two kinds of engine. `request` is what travels between them, and
`compat` holds all that depends on vLLM's version.
"""
