"""What a simulated run gave.

`logs` turns what the compiled loop wrote into plain arrays, per request and per step; `summary` has the percentiles and
shares that follow, which a measured run has too (gpu.serve.replay); `result` puts both together.
"""
