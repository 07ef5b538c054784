"""torch and vLLM: policy trainer, reference, samplers. Synchronous; no event loop, no Ray, no HTTP."""
