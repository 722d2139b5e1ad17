"""Task lists: which tiles of which row every CTA takes, and where each partial state goes."""
