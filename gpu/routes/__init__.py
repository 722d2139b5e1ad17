"""Every engine behind one interface, and the router that takes the cheapest."""
