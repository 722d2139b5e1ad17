"""The closed form: what a step of one route costs, from its constants. Compiled."""
