"""What backends that run the model in this process share.

backend.py        batches of prefixes and questions, one forward pass at a time
prefix_cache.py   cached prefixes, in memory and on disk
store.py          the files of the cache
"""
