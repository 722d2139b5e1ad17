"""Servers whose decode steps read selected pages: which kinds of layers do, at what price, and what it gave (`pages`);
what their summaries take of the memory (`memory`)."""
