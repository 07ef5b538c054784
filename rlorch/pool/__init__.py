"""Many sampler replicas as one: admission, routing, adaptive concurrency, retries."""
