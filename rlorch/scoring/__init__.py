"""Reward plug-ins, the killable worker that runs them, and advantages."""
