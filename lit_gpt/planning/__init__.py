"""Choose a model for a text, a machine and a budget of time; estimate the time and the memory that a run needs."""
