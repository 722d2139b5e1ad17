"""vLLM's attention backend CUSTOM.

`plugin` registers it, `backend` is it, `builder` prepares its steps, `step` cuts them, `engines` decodes, each
engine in an `engine_slot`; `options` are those of --additional-config. They are written for vLLM 0.24, and
`backend_0_33` overrides what is other in 0.33.
"""
