"""Requests before and between their steps: `clients` (who sends what when), `orders` (who goes first), `waiting` (the
queue), `pages` (what a request holds of the pool, and what is kept for the next turn)."""
