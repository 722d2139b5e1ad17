"""What tiers of KV did in a run: `rows` of the table, and `lanes` of the timeline, one for each way of a device."""
