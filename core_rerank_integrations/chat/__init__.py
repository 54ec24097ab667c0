"""A chatbot in the browser that shows what its answers rest on: ``core-rerank chat``."""
