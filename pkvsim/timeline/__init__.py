"""The simulation: a step's tasks on CTA slots that share the bandwidth."""
