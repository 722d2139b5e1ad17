"""vLLM's attention backend CUSTOM.

`plugin` registers it, `backend` is it, `builder` prepares its steps, `step` cuts them, `engines` decodes.
"""
