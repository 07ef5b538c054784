"""Reward plug-ins that ship with rlorch."""
