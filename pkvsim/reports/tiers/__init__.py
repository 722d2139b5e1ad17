"""What tiers of KV did in a run.

`rows` are those of whatif's table; `lanes` are the timeline's, one for each way of a device.
"""
