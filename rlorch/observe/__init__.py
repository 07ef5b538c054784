"""What a run shows: metrics, trace, console, report, and the sinks they go to."""
