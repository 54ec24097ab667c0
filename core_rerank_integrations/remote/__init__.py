"""A reranker whose model runs in a server.

reranker.py     `RemoteReranker`: the calls of a `CoReReranker`
connection.py   requests, retries, and the server's errors
replies.py      from replies to results
"""
