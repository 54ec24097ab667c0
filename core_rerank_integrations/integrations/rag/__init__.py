"""Answers from reranked passages, with citations: a chain for LangChain, one for LlamaIndex."""
