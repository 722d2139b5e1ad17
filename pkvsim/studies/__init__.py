"""The questions that the commands answer: one step, a replay, what if, a sweep."""
