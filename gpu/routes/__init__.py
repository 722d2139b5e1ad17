"""Every engine behind one interface, and the router that takes the cheapest.

Read `route_engines` (what each route is driven by, and why it may be missing), then `router`: it asks the policy of
pkvsim for every step and keeps one StepPlanner a route. `flashinfer_decode` and `flashinfer_route` drive FlashInfer's
backends, each at its best; `flashinfer_builds` tells a kernel that FlashInfer could not build from a fault.
"""
