"""Reward plug-ins that ship with rlorch: the module's name is the plug-in's name.

    exact          the completion is the answer
    math           the completion is mathematically equal to the answer (extra: math)
    format         the completion matches a regular expression
    length         soft punishment of overlong completions (DAPO)
    code           the completion's Python code passes the row's tests (not a sandbox)
    reasoning_gym  the task's own scoring (extra: reasoning-gym)
    judge          a model behind an OpenAI-compatible endpoint gives the score

Each is used in a config as `rewards.terms: [{plugin: exact, weight: 1.0, options: {...}}]`.
"""
