"""Our engine behind interfaces that others already call."""
