"""Answers from reranked passages, with citations: one chain in LangChain, one in LlamaIndex."""
