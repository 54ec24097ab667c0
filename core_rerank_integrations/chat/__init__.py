"""A chatbot in the browser that shows the evidence for its answers: ``core-rerank chat``."""
