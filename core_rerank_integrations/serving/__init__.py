"""A rerank server for clients of Cohere, Jina, vLLM, Voyage and Text Embeddings Inference.

app.py        routes, errors, loading and closing the model
dialects.py   requests and replies
replies.py    from results to replies
queue.py      one queue in front of the model
limits.py     what a request may cost
guard.py      the API key, and bodies of requests
errors.py     errors with a status
metrics.py    figures for Prometheus
vllm.py       the routes in vLLM's own server
server.py     runs the app until the program is stopped
"""
