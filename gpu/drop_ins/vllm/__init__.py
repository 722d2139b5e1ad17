"""vLLM's attention backend CUSTOM.

`plugin` registers it, `backend` is it, `builder` prepares its steps, `step` cuts them, `engines` decodes, each
engine in an `engine_slot`; `options` are those of --additional-config.
"""
