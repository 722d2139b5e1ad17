"""Studies of selected pages: what one step saves by them (`step`), and what to know of such figures (`notes`)."""
