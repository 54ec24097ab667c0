"""Who runs the model. One module a library; nothing outside it imports that library."""
