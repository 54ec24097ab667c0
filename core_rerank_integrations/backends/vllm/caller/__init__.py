"""The side of the vLLM backends that runs in the user's process."""
